"""Weights as small modules: call one with activations and it multiplies, however it is stored.

A layer never knows how its weight is kept: dense, packed to a few bits, or with a low-rank update
beside it. Every weight of a decoder
carries its layers stacked on a leading axis; `lax.scan` hands the block one layer of it.
"""

from idp_jax.weights.base import Dense, Lora, Prepared, Quantized, for_kernels, is_compressed

__all__ = ["Dense", "Lora", "Prepared", "Quantized", "for_kernels", "is_compressed"]
