"""Products with packed weights in plain XLA: the path that runs everywhere.

Faster kernels are measured against it. Invariant: weights are expanded as scale * (q - zero) in
float32 and only then cast; products accumulate in float32. Expanded weights never outlive the call,
in differentiation neither: the backward pass expands them again instead of storing them.
"""

import functools

import jax
import jax.numpy as jnp

from ..packing import unpack
from ..stack import slice_layer
from .layout import KernelWeight, codes_of, scales_and_zeros


def dequantize(
    words: jax.Array,
    scales: jax.Array,
    zeros: jax.Array,
    *,
    bits: int,
    group_index: jax.Array | None = None,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> jax.Array:
    """Expands a packed weight.

    Args:
      words: int32 [I * bits / 32, O], packed along the inputs (see packing.py).
      scales: float16 or float32 [G, O].
      zeros: unsigned integers [G, O].
      bits: 2, 3, 4 or 8.
      group_index: int32 [I], the group of every input; by default G runs of I // G inputs.
      dtype: of the result.

    Returns:
      Weights [I, O].

    Raises:
      ValueError: if the inputs do not divide into G groups, or the shapes of scales and zeros
        differ.
    """
    groups, outputs = scales.shape
    if zeros.shape != scales.shape:
        raise ValueError(f"zeros {zeros.shape} must have the shape of scales {scales.shape}")
    codes = unpack(words, bits)
    inputs = codes.shape[0]
    codes = codes.astype(jnp.float32)
    scales, zeros = scales.astype(jnp.float32), zeros.astype(jnp.float32)
    if group_index is not None:
        weights = scales[group_index] * (codes - zeros[group_index])
        return weights.astype(dtype)
    if inputs % groups:
        raise ValueError(f"{inputs} inputs do not divide into {groups} groups: pass group_index")
    codes = codes.reshape(groups, inputs // groups, outputs)
    weights = scales[:, None, :] * (codes - zeros[:, None, :])
    return weights.reshape(inputs, outputs).astype(dtype)


def quant_matmul(
    x: jax.Array,
    words: jax.Array,
    scales: jax.Array,
    zeros: jax.Array,
    *,
    bits: int,
    group_index: jax.Array | None = None,
) -> jax.Array:
    """Multiplies by a packed weight: y = x @ dequantize(words, scales, zeros).

    Args:
      x: float32 or bfloat16 [..., I].
      words: int32 [I * bits / 32, O].
      scales: float16 or float32 [G, O].
      zeros: unsigned integers [G, O].
      bits: 2, 3, 4 or 8.
      group_index: int32 [I], the group of every input; by default G runs of I // G inputs.

    Returns:
      [..., O] of x's dtype, accumulated in float32. Differentiable in x and scales.

    Raises:
      ValueError: if the shapes do not fit together.
    """
    inputs = words.shape[0] * 32 // bits
    if x.shape[-1] != inputs:
        raise ValueError(
            f"x has {x.shape[-1]} features but the {bits}-bit words hold {inputs} inputs: "
            "check bits and the packed axis"
        )
    product = functools.partial(_expand_and_multiply, bits=bits)
    with jax.named_scope("quant_matmul.xla"):
        return jax.checkpoint(product)(x, words, scales, zeros, group_index)


def _expand_and_multiply(
    x: jax.Array,
    words: jax.Array,
    scales: jax.Array,
    zeros: jax.Array,
    group_index: jax.Array | None,
    *,
    bits: int,
) -> jax.Array:
    weights = dequantize(words, scales, zeros, bits=bits, group_index=group_index, dtype=x.dtype)
    return jnp.matmul(x, weights, preferred_element_type=jnp.float32).astype(x.dtype)


def multiply(x: jax.Array, weight: KernelWeight) -> jax.Array:
    """Multiplies x [..., I], in the order of the words, by a weight in the kernels' layout.

    Gives [..., O] and is differentiable in x; like `quant_matmul` above otherwise.
    """

    def product(x, weight):
        expanded = expand(slice_layer(weight), x.dtype)
        return jnp.matmul(x, expanded, preferred_element_type=jnp.float32).astype(x.dtype)

    return jax.checkpoint(product)(x, weight)


def expand(weight: KernelWeight, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
    """Weights [I, O] of the kernels' layout, in the order of the words."""
    scales, zeros = scales_and_zeros(weight)
    codes = codes_of(weight).astype(jnp.float32).reshape(weight.groups, -1, weight.outputs)
    centred = codes - zeros.astype(jnp.float32)[:, None]
    return (scales.astype(jnp.float32)[:, None] * centred).reshape(-1, weight.outputs).astype(dtype)
