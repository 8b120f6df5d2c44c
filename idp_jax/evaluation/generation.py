"""Decoding: one compiled prefill and one loop of decode steps that never leaves the device.

The input's keys and values are put into a cache with room for the new tokens, and every step writes one slot of it in place.
Prompt lengths are rounded up to a few buckets (by padding on the left), so that a whole evaluation compiles a handful of times.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from idp_jax.evaluation.buckets import bucket
from idp_jax.models import KV, Decoder
from idp_jax.models.cache import concatenate
from idp_jax.recover import Repaired


def generate(
    repaired: Repaired | Decoder,
    input_ids,
    attention_mask=None,
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int] = (),
    temperature: float = 0.0,
    top_k: int | None = None,
    key: jax.Array | None = None,
) -> jax.Array:
    """Continues every prompt.

    Args:
        input_ids: int [B, T]; shorter prompts are padded on the left.
        attention_mask: int [B, T], 1 for text and 0 for padding; default all 1.
        max_new_tokens: tokens to add, unless all rows stop before.
        stop_ids: tokens that end a row.
        temperature: 0 takes the likeliest token; above 0 samples, and needs a key.
        top_k: sample among the k likeliest tokens only.
        key: a `jax.random` key; the same key gives the same tokens.

    Returns:
        int32 [B, max_new_tokens]; the stop token that ended a row is repeated to the row's end.

    Raises:
        ValueError: an empty prompt, a bad setting, an id outside the vocabulary, or more tokens than learned positions.
    """
    repaired = Repaired.of(repaired)
    ids = np.asarray(input_ids, np.int32)
    mask = np.ones_like(ids) if attention_mask is None else np.asarray(attention_mask, np.int32)
    _check(repaired, ids, mask, max_new_tokens, temperature, top_k, key)
    if max_new_tokens == 0:
        return jnp.zeros((ids.shape[0], 0), jnp.int32)
    ids, mask = _pad_left(ids, mask, repaired.decoder.config.rope is None)
    stop = np.zeros(repaired.decoder.config.vocab_size, bool)
    stop[list(stop_ids)] = True
    key = jax.random.key(0) if key is None else key
    greedy = temperature == 0
    settings = {"slots": bucket(max_new_tokens), "top_k": None if greedy else top_k, "greedy": greedy}
    limit, scale = np.int32(max_new_tokens), np.float32(temperature)
    return _generate(repaired, ids, mask, stop, limit, scale, key, **settings)[:, :max_new_tokens]
