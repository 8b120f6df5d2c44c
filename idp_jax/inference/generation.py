"""Decoding: one compiled prefill and one loop of decode steps that never leaves the device.

The input's keys and values are put into a cache with room for the new tokens, and every step writes
one slot of it in place. Prompt lengths are rounded up to a few buckets (by padding on the left), so
that a whole evaluation compiles a handful of times.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np

from idp_jax.inference.buckets import bucket
from idp_jax.inference.sampling import Pick
from idp_jax.inference.text import decode, encode, is_text
from idp_jax.models import KV, Decoder
from idp_jax.models.block import Block
from idp_jax.models.cache import concatenate
from idp_jax.models.inputs import token_arrays
from idp_jax.models.storage import layers_apart
from idp_jax.processes import gather
from idp_jax.recover import Repaired


@overload
def generate(
    repaired: Repaired | Decoder,
    prompts: str,
    *,
    tokenizer: Any,
    max_new_tokens: int,
    stop_ids: Sequence[int] | None = ...,
    temperature: float = ...,
    top_k: int | None = ...,
    top_p: float | None = ...,
    key: jax.Array | None = ...,
) -> str: ...


@overload
def generate(
    repaired: Repaired | Decoder,
    prompts: Sequence[str],
    *,
    tokenizer: Any,
    max_new_tokens: int,
    stop_ids: Sequence[int] | None = ...,
    temperature: float = ...,
    top_k: int | None = ...,
    top_p: float | None = ...,
    key: jax.Array | None = ...,
) -> list[str]: ...


@overload
def generate(
    repaired: Repaired | Decoder,
    prompts: Any,
    attention_mask: Any = ...,
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int] | None = ...,
    temperature: float = ...,
    top_k: int | None = ...,
    top_p: float | None = ...,
    key: jax.Array | None = ...,
) -> jax.Array: ...


def generate(
    repaired,
    prompts,
    attention_mask=None,
    *,
    tokenizer=None,
    max_new_tokens,
    stop_ids=None,
    temperature=0.0,
    top_k=None,
    top_p=None,
    key=None,
):
    """Continues every prompt: text in, text out, or ids in, ids out.

    Args:
        prompts: a text or several; or int [B, T], shorter prompts padded on the left; or what a
            tokenizer returns of them (a BatchEncoding).
        attention_mask: int [B, T], 1 for text and 0 for padding; default all 1. With ids only.
        tokenizer: for text: the model's, see `idp_jax.load_tokenizer`.
        max_new_tokens: tokens to add, unless all rows stop before.
        stop_ids: tokens that end a row; those outside the vocabulary are never met. By default the
            model's own with text, none with ids.
        temperature: 0 takes the likeliest token; above 0 samples, and needs a key.
        top_k: sample among the k likeliest tokens only.
        top_p: and of those among the fewest that have this probability together.
        key: a `jax.random` key; the same key gives the same tokens.

    Returns:
        The new text, a str or a list as was given, without the token that ended it; or int32
        [B, max_new_tokens], where the stop token that ended a row is repeated to the row's end. In
        a job of several processes each gets all rows.

    Raises:
        ValueError: an empty prompt, a bad setting, text without a tokenizer, an id outside the
            vocabulary, more tokens than learned positions, or logits that are not finite.
    """
    repaired = Repaired.of(repaired)
    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "key": key}
    if not is_text(prompts):
        ids, mask = token_arrays(prompts, attention_mask)
        stops = () if stop_ids is None else stop_ids
        return _checked(*continued(repaired, ids, mask, max_new_tokens, stops, **settings))
    if tokenizer is None:
        raise ValueError("text needs a tokenizer: generate(model, text, tokenizer=...)")
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    stops = repaired.decoder.config.eos_token_ids if stop_ids is None else stop_ids
    ids, mask = encode(tokenizer, texts)
    rows = _checked(*continued(repaired, ids, mask, max_new_tokens, stops, **settings))
    written = decode(tokenizer, np.asarray(rows), stops)
    return written[0] if isinstance(prompts, str) else written


def _checked(rows: jax.Array, finite: jax.Array) -> jax.Array:
    """The likeliest of logits that are not numbers would be a token like any other."""
    rows, finite = gather((rows, finite))
    bad = np.flatnonzero(~np.asarray(finite))
    if len(bad):
        raise ValueError(
            f"the logits behind prompt {bad[0]} of {len(finite)} are not finite (NaN or infinity): "
            "the model, its adapter or its selector gives numbers that cannot be computed with"
        )
    return rows


def continued(
    repaired: Repaired,
    ids,
    mask,
    max_new_tokens: int,
    stop_ids,
    *,
    temperature,
    top_k,
    top_p=None,
    key,
) -> tuple[jax.Array, jax.Array]:
    """What `generate` does with ids, for callers that can do without a row.

    Returns:
        The new tokens, int32 [B, max_new_tokens], and whether all logits that they were picked by
        are finite, bool [B].
    """
    ids = np.asarray(ids)
    mask = np.ones_like(ids) if mask is None else np.asarray(mask)
    check_input(repaired, ids, mask, max_new_tokens)
    vocabulary = repaired.decoder.config.vocab_size
    if temperature > 0 and key is None:
        raise ValueError(f"temperature {temperature} samples, which needs a random key; or give 0")
    pick = Pick.of(vocabulary, temperature, top_k, top_p)
    if max_new_tokens == 0:
        return jnp.zeros((ids.shape[0], 0), jnp.int32), jnp.ones(ids.shape[0], bool)
    ids, mask = pad_left(ids, mask)
    stop = np.zeros(vocabulary, bool)
    stop[[token for token in stop_ids if 0 <= token < vocabulary]] = True
    key = jax.random.key(0) if key is None else key
    limit, slots = np.int32(max_new_tokens), bucket(max_new_tokens)
    rows, finite = _generate(repaired, ids, mask, stop, limit, pick, key, slots=slots)
    return rows[:, :max_new_tokens], finite


def check_input(repaired: Repaired, ids: np.ndarray, mask: np.ndarray, max_new_tokens: int) -> None:
    """Refuses, by ValueError, prompts that `continued` cannot read."""
    config = repaired.decoder.config
    if ids.ndim != 2 or mask.shape != ids.shape:
        raise ValueError(
            f"input_ids and attention_mask must be one [B, T], got {ids.shape} and {mask.shape}"
        )
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be 0 or more, got {max_new_tokens}")
    if ids.size == 0 or not mask[:, -1].all():
        raise ValueError(
            "every prompt needs a last token: give text, and pad shorter prompts on the left"
        )
    # A column, because only the ids are checked here: padding does not count as length.
    repaired.decoder.check(ids.reshape(-1, 1))
    before = 0 if repaired.prefix is None else int(repaired.prefix.next_position.max())
    end = before + int((mask > 0).sum(1).max()) + max_new_tokens
    if config.rope is None and end > config.max_positions:
        raise ValueError(
            f"{end} tokens (prompt and new ones included) exceed the {config.max_positions} "
            "learned positions; shorten the input or ask for fewer"
        )


def pad_left(ids: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask [B, T] of a length in use."""
    spare = [(0, 0), (bucket(ids.shape[1]) - ids.shape[1], 0)]
    return np.pad(ids, spare), np.pad(mask, spare)


def prefill(repaired: Repaired, input_ids, attention_mask, slots: int) -> tuple[jax.Array, KV]:
    """Reads the prompts (traceable).

    Returns:
        float32 [B, V] logits of the first new token, and a cache [prefix, prompt, `slots` empty
        slots].
    """
    decoder = repaired.decoder
    past = repaired.past(input_ids, attention_mask)
    hidden, cache = decoder.hidden(input_ids, attention_mask, past=past, keep=True)
    cache = cache if past is None else concatenate(past, cache)
    return decoder.logits(hidden[:, -1]), cache.reserve(slots)


def decode_step(
    decoder: Decoder,
    tokens: jax.Array,
    cache: KV,
    slot,
    layers: tuple[Block, ...] | None = None,
) -> tuple[jax.Array, KV]:
    """Reads one token per row, int32 [B], into the cache at `slot` (traceable).

    Args:
        layers: what `layers_apart` gives, for many steps.

    Returns:
        float32 [B, V] logits of the next token, and the cache.
    """
    # The mask says that not every slot of the cache is a token: its length is no position.
    alone = jnp.ones((tokens.shape[0], 1), jnp.int32)
    hidden, new = decoder.hidden(tokens[:, None], alone, past=cache, keep=True, layers=layers)
    return decoder.logits(hidden[:, 0]), cache.write(new, slot)


@partial(jax.jit, static_argnames="slots")
def _generate(repaired, ids, mask, stop, limit, pick: Pick, key, *, slots):
    draw = lambda step: partial(jax.random.categorical, jax.random.fold_in(key, step))
    layers = layers_apart(repaired.decoder)
    logits, cache = prefill(repaired, ids, mask, slots)
    start = cache.length - slots
    first, finite = pick(logits, draw(0))
    tokens = jnp.zeros((ids.shape[0], slots), jnp.int32).at[:, 0].set(first)

    def unfinished(state):
        step, _, _, last, finite = state
        return (step < limit) & ~(stop[last] | ~finite).all()

    def advance(state):
        step, tokens, cache, last, finite = state
        logits, cache = decode_step(repaired.decoder, last, cache, start + step - 1, layers)
        new, well = pick(logits, draw(step))
        finite = finite & (well | stop[last])
        new = jnp.where(stop[last], last, new)
        tokens = jax.lax.dynamic_update_slice(tokens, new[:, None], (jnp.int32(0), step))
        return step + 1, tokens, cache, new, finite

    step, tokens, _, last, finite = jax.lax.while_loop(
        unfinished, advance, (jnp.int32(1), tokens, cache, first, finite)
    )
    return jnp.where(jnp.arange(slots) < step, tokens, last[:, None]), finite
