"""The pieces that LLaMA and OPT blocks are made of: norms, rotary positions and masks.

Normalisation and rotation run in float32 whatever the dtype of the activations.

Dims: B batch, T time, N heads, H head dim.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from idp_jax.models.config import RopeConfig


class Norm(nnx.Module):
    """RMSNorm (LLaMA) or LayerNorm (OPT) over the last axis; [..., D] -> [..., D]."""

    def __init__(self, scale, bias=None, *, centred: bool, epsilon: float):
        self.scale = None if scale is None else nnx.Param(scale)
        self.bias = None if bias is None else nnx.Param(bias)
        self.centred = centred
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        if self.centred:
            x32 = x32 - x32.mean(-1, keepdims=True)
        x32 = x32 * jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + self.epsilon)
        if self.scale is not None:
            x32 = x32 * self.scale[...].astype(jnp.float32)
        if self.bias is not None:
            x32 = x32 + self.bias[...].astype(jnp.float32)
        return x32.astype(x.dtype)

    def logical_axes(self) -> dict[str, Any]:
        """What the axes of the parameters mean, see `sharding.declared_axes`."""
        return {"scale": ("embed_activation",), "bias": ("embed_activation",)}


def rope_frequencies(
    rope: RopeConfig, head_dim: int, max_positions: int, length: jax.Array | None = None
) -> jax.Array:
    """Inverse frequencies of the rotary embedding, [H / 2] float32.

    Source: transformers' `modeling_rope_utils` (default, linear, dynamic NTK and llama3 scaling).

    Args:
        length: the number of positions in use (scalar), which dynamic scaling depends on.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    base = np.float32(rope.theta)
    if rope.kind == "dynamic":
        factor = rope["factor"]
        used = jnp.maximum(jnp.asarray(0 if length is None else length), max_positions)
        stretch = jnp.float32(factor) * used.astype(jnp.float32) / jnp.float32(max_positions)
        stretch = stretch - jnp.float32(factor - 1)
        power = jnp.float32(head_dim / (head_dim - 2))
        return 1.0 / (base * stretch**power) ** jnp.asarray(exponents)
    frequencies = np.float32(1) / base**exponents
    if rope.kind == "linear":
        frequencies = frequencies / np.float32(rope["factor"])
    if rope.kind == "llama3":
        frequencies = _llama3_frequencies(rope, frequencies)
    return jnp.asarray(frequencies, jnp.float32)


def _llama3_frequencies(rope: RopeConfig, frequencies: np.ndarray) -> np.ndarray:
    original = rope["original_max_position_embeddings"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    wavelength = 2 * np.pi / frequencies
    slow = frequencies / rope["factor"]
    blend = (original / wavelength - low) / (high - low)
    smooth = (1 - blend) * slow + blend * frequencies
    result = np.where(wavelength > original / low, slow, frequencies)
    between = (wavelength <= original / low) & (wavelength >= original / high)
    return np.where(between, smooth, result).astype(np.float32)


def rotation(positions: jax.Array, frequencies: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines [..., H] of the rotary angles at `positions` [...]."""
    angles = positions[..., None].astype(jnp.float32) * frequencies
    angles = jnp.concatenate([angles, angles], -1)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x_BTNH: jax.Array, cos_BTH: jax.Array, sin_BTH: jax.Array) -> jax.Array:
    """Applies the rotary embedding in Hugging Face's half-split order."""
    x32 = x_BTNH.astype(jnp.float32)
    first, second = jnp.split(x32, 2, -1)
    turned = jnp.concatenate([-second, first], -1)
    return (x32 * cos_BTH[:, :, None] + turned * sin_BTH[:, :, None]).astype(x_BTNH.dtype)


def visibility(attention_mask: jax.Array, segments: jax.Array | None = None) -> jax.Array:
    """Which earlier tokens of the input each token sees: bool [B, T, T] (query, key).

    Args:
        attention_mask: int [B, T]. 0 is padding and 1 ordinary text, as in transformers. A
            number above 1 marks a branch: its tokens see the text marked 1 and their own branch, so
            several continuations of one context are scored in one row.
        segments: int [B, T], the document of each token, or None where a row is one text. No token
            sees another document's.
    """
    # Text never sees a branch, because its mask of 1 equals no branch's number: an answer that
    # stands before more text, or another answer, changes nothing behind it. A row of padding may
    # still see text before it; nothing ever reads it, because no key of it is visible.
    length = attention_mask.shape[1]
    causal = jnp.tril(jnp.ones((length, length), bool))
    query, key = attention_mask[:, :, None], attention_mask[:, None, :]
    visible = causal & (key > 0) & ((key == 1) | (key == query))
    if segments is None:
        return visible
    return visible & (segments[:, :, None] == segments[:, None, :])


def seen_tokens(attention_mask: jax.Array, segments: jax.Array | None = None) -> jax.Array:
    """How many tokens of the input each token sees, itself included: int32 [B, T].

    What `visibility` says, summed over its keys, without that table: to sum it takes T x T reads a
    row, and its compiler aborts at such sums for TPU v5p from 2,048 tokens on.

    Args: as of `visibility`.
    """
    # Positions follow from this: a token stands behind as many as it sees, so every branch begins
    # where the context ends and every document where the row does, and padding on the left counts
    # for nothing.
    text = attention_mask == 1
    if segments is None:
        context = jnp.cumsum(text, -1, dtype=jnp.int32)
        return context + _counted(attention_mask > 1, attention_mask)
    return _counted(text, segments) + _counted(attention_mask > 1, attention_mask, segments)


def _counted(which: jax.Array, *labels: jax.Array) -> jax.Array:
    """Of the tokens up to each one, those in `which` that have all its labels: int32 [B, T]."""
    order = jnp.lexsort(labels)  # stable: those of one label keep their order
    sort = lambda x: jnp.take_along_axis(x, order, -1)
    found = sort(which).astype(jnp.int32)
    total = jnp.cumsum(found, -1)
    begins = jnp.zeros(found.shape, bool).at[..., 0].set(True)
    for label in map(sort, labels):
        begins = begins.at[..., 1:].set(begins[..., 1:] | (label[..., 1:] != label[..., :-1]))
    # The total never falls, so the largest one met at a beginning is that of the last.
    before = jax.lax.cummax(jnp.where(begins, total - found, 0), axis=total.ndim - 1)
    return jnp.put_along_axis(jnp.zeros_like(total), order, total - before, -1, inplace=False)
