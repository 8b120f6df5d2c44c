"""What a model may be called with: arrays, lists, or what a tokenizer returns."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp


def token_arrays(input_ids, attention_mask=None) -> tuple[jax.Array, jax.Array | None]:
    """Token ids and their mask as int32 arrays [B, T].

    Args:
        input_ids: ids, or a mapping with `input_ids` and perhaps `attention_mask`, as a
            transformers tokenizer returns it.
        attention_mask: overrides that of the mapping.

    Raises:
        ValueError: rows of different lengths.
    """
    if isinstance(input_ids, Mapping):
        given = input_ids.get("attention_mask") if attention_mask is None else attention_mask
        input_ids, attention_mask = input_ids["input_ids"], given
    mask = None if attention_mask is None else _int32(attention_mask)
    return _int32(input_ids), mask


def _int32(rows) -> jax.Array:
    if isinstance(rows, list | tuple):
        lengths = sorted({len(row) for row in rows if isinstance(row, list | tuple)})
        if len(lengths) > 1:
            raise ValueError(
                f"rows of {lengths[0]} and {lengths[-1]} tokens make no array; "
                "pad the shorter ones (tokenizer: padding=True)"
            )
    return jnp.asarray(rows, jnp.int32)
