"""Weights as small modules: call one with activations and it multiplies, however it is stored.

A layer never knows how its weight is kept: dense, packed to a few bits, or with a low-rank update
beside it. Every weight of a decoder carries its layers stacked on a leading axis; a block has one
layer of it (models/block.py).

Kernels are kept as [I, O] (inputs first), so that activations multiply from the left without a
transpose; checkpoints and the papers' compression algorithms use [O, I], and the formats turn them
on the way in and out. The invariant: `w(x)` equals `x @ w.dense() + bias`. To add a kind, write a
module with `__call__(x)`, `dense(dtype)` and `bias`; the models need nothing else.
"""

from idp_jax.weights.dense import Dense
from idp_jax.weights.lora import Lora
from idp_jax.weights.prepared import Prepared, for_kernels, is_compressed
from idp_jax.weights.quantized import Quantized

__all__ = ["Dense", "Lora", "Prepared", "Quantized", "for_kernels", "is_compressed"]
