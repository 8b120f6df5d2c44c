"""The pieces that LLaMA and OPT blocks are made of: norms, rotary positions, masks and attention.

Normalisation, rotation and softmax run in float32 whatever the dtype of the activations.
Dims: B batch, T query time, S stored (past) time, N heads, K kv heads, G = N / K, H head dim.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from idp_jax.models.config import RopeConfig

_MASKED = -1e30  # finite, so that a row that sees nothing gives a mean instead of NaN


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


def visibility(attention_mask: jax.Array) -> jax.Array:
    """Which earlier tokens of the input each token sees: bool [B, T, T] (query, key).

    Args:
        attention_mask: int [B, T]. 0 is padding and 1 ordinary text, as in transformers. A number above 1 marks a branch:
            its tokens see the text marked 1 and their own branch, so several continuations of one
            context are scored in one row.
    """
    length = attention_mask.shape[1]
    causal = jnp.tril(jnp.ones((length, length), bool))
    query, key = attention_mask[:, :, None], attention_mask[:, None, :]
    return causal & (key > 0) & ((key == 1) | (key == query))


def attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    visible_BTT: jax.Array,
    past: tuple[jax.Array, jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """Attention of the input over the past and itself; the past is always visible where it holds something.

    Args:
        visible_BTT: bool, from `visibility`.
        past: keys and values [B | 1, S, K, H] and their mask [B | 1, S].

    Returns:
        [B, T, N * H] in the dtype of q.
    """
    batch, time, heads, width = q_BTNH.shape
    kv_heads = k_BTKH.shape[2]
    groups = heads // kv_heads
    scale = np.float32(width**-0.5)
    q_BKGTH = jnp.moveaxis((q_BTNH * scale.astype(q_BTNH.dtype)), 1, 2)
    q_BKGTH = q_BKGTH.reshape(batch, kv_heads, groups, time, width)

    def scores(keys, mask):
        shared = keys.shape[0] == 1 and batch > 1
        equation = "bkgth,skh->bkgts" if shared else "bkgth,bskh->bkgts"
        keys = keys[0] if shared else keys
        logits = jnp.einsum(equation, q_BKGTH, keys, preferred_element_type=jnp.float32)
        return jnp.where(mask, logits, _MASKED)

    def mixture(weights, values):
        shared = values.shape[0] == 1 and batch > 1
        equation = "bkgts,skh->btkgh" if shared else "bkgts,bskh->btkgh"
        values = values[0] if shared else values
        weights = weights.astype(values.dtype)
        return jnp.einsum(equation, weights, values, preferred_element_type=jnp.float32)

    logits = scores(k_BTKH, visible_BTT[:, None, None])
    if past is None:
        mixed = mixture(jax.nn.softmax(logits, -1), v_BTKH)
    else:
        past_k, past_v, past_mask = past
        stored = scores(past_k.astype(q_BTNH.dtype), past_mask[:, None, None, None])
        weights = jax.nn.softmax(jnp.concatenate([stored, logits], -1), -1)
        split = stored.shape[-1]
        mixed = mixture(weights[..., :split], past_v.astype(q_BTNH.dtype))
        mixed = mixed + mixture(weights[..., split:], v_BTKH)
    return mixed.reshape(batch, time, heads * width).astype(q_BTNH.dtype)
