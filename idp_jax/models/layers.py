"""The pieces that LLaMA and OPT blocks are made of: norms, rotary positions, masks and attention.

Normalisation, rotation and softmax run in float32 whatever the dtype of the activations.

Dims: B batch, T query time, S stored (past) time, N heads, K kv heads, G = N / K, H head dim.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from idp_jax.models.config import RopeConfig

_MASKED = -1e30  # finite, so that a row that sees nothing gives a mean instead of NaN
_SMALLEST_BLOCK = 128  # queries of one attention block
_MOST_BLOCKS = 8


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


def attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    visible_BTT: jax.Array,
    past: tuple[jax.Array, jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """Attention of the input over itself and the past, which is visible where it holds something.

    Queries go in blocks, each against the keys up to its own end, because later ones are hidden
    anyway: half the work, and the scores of a block stay in cache. There are at most eight blocks,
    so that the program does not grow with the input.

    Args:
        visible_BTT: bool, from `visibility`; it must be causal.
        past: keys and values [B | 1, S, K, H] and their mask [B | 1, S].

    Returns:
        [B, T, N * H] in the dtype of q.
    """
    time = q_BTNH.shape[1]
    size = max(_SMALLEST_BLOCK, -(-time // _MOST_BLOCKS))
    blocks = []
    for start in range(0, time, size):
        end = min(start + size, time)
        seen = visible_BTT[:, start:end, :end]
        sources = [(k_BTKH[:, :end], v_BTKH[:, :end], seen[:, None, None])]
        if past is not None:
            keys, values, mask = past
            dtype = q_BTNH.dtype
            sources.append((keys.astype(dtype), values.astype(dtype), mask[:, None, None, None]))
        blocks.append(_attend(q_BTNH[:, start:end], sources))
    return blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, 1)


def _attend(q_BTNH: jax.Array, sources: list) -> jax.Array:
    """One softmax over several stretches of keys, (keys, values, mask) each.

    Normalised after the mixing: the sum of the weights divides the result [T, H], not the scores
    [T, S].
    """
    batch, time, heads, width = q_BTNH.shape
    kv_heads = sources[0][0].shape[2]
    shape = (batch, kv_heads, heads // kv_heads, time)
    scale = np.float32(width**-0.5).astype(q_BTNH.dtype)
    rows = jnp.moveaxis(q_BTNH * scale, 1, 2).reshape(batch, kv_heads, -1, width)
    logits = []
    for keys, _, mask in sources:
        shared = keys.shape[0] == 1 and batch > 1
        equation = "bkrh,skh->bkrs" if shared else "bkrh,bskh->bkrs"
        keys = keys[0] if shared else keys
        scores = jnp.einsum(equation, rows, keys, preferred_element_type=jnp.float32)
        logits.append(jnp.where(mask, scores.reshape(*shape, -1), _MASKED))
    # The largest score only keeps exp in range: the result does not depend on it.
    top = [jax.lax.stop_gradient(x).max(-1, keepdims=True, initial=_MASKED) for x in logits]
    top = top[0] if len(top) == 1 else jnp.maximum(*top)
    total, mixed = jnp.float32(0), jnp.float32(0)
    for scores, (_, values, _) in zip(logits, sources, strict=True):
        weights = jnp.exp(scores - top)
        total = total + weights.sum(-1, keepdims=True)
        shared = values.shape[0] == 1 and batch > 1
        equation = "bkrs,skh->bkrh" if shared else "bkrs,bskh->bkrh"
        values = values[0] if shared else values
        weights = weights.reshape(*rows.shape[:3], -1).astype(values.dtype)
        part = jnp.einsum(equation, weights, values, preferred_element_type=jnp.float32)
        mixed = mixed + part.reshape(*shape, width)
    out = (mixed / total).astype(q_BTNH.dtype)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, time, heads * width)
