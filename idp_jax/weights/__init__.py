"""Weights as small modules: call one with activations and it multiplies, however it is stored.

A layer never knows how its weight is kept: dense, packed to a few bits, or with a low-rank update
beside it. Every weight of a decoder carries its layers stacked on a leading axis; a block has one
layer of it (models/block.py).

Kernels are kept as [I, O] (inputs first), so that activations multiply from the left without a
transpose; checkpoints and the papers' compression algorithms use [O, I], and the formats turn them
on the way in and out. The invariant: `w(x)` equals `x @ w.dense() + bias`. To add a kind, write a
module with `__call__(x)`, `dense(dtype)`, `bias` and `logical_axes(inputs, outputs)`, and for
meshes `without_bias`, `order`, `in_order`, `divides` and `part`; the models need nothing else.
"""

from idp_jax.weights.dense import Dense
from idp_jax.weights.lora import Lora
from idp_jax.weights.quantized import Quantized
from idp_jax.weights.repacked import Repacked, is_compressed, repack
from idp_jax.weights.stage import products

__all__ = ["Dense", "Lora", "Quantized", "Repacked", "is_compressed", "products", "repack"]
