"""Weights as small modules: call one with activations and it multiplies, however it is stored.

A layer never knows how its weight is kept: dense, packed to a few bits, or with a low-rank update
beside it. Every weight of a decoder
carries its layers stacked on a leading axis; a block has one layer of it (models/block.py).
"""

from idp_jax.weights.base import Dense, Lora, Prepared, Quantized, for_kernels, is_compressed

__all__ = ["Dense", "Lora", "Prepared", "Quantized", "for_kernels", "is_compressed"]
