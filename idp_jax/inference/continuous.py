"""Continuous batching: a row that has ended makes room for the next prompt at once.

The cache holds for every row [prefix, prompt, new tokens]. The slots of the new tokens are a ring
that all rows go round together, so that a step writes one slot, the same for all: attention does
not ask in which order tokens lie, and a row that is filled anew starts with an empty ring.

The invariant: what a prompt is continued by depends on it, the settings and the seed, and not on
what stands beside it (as far as sums of other shapes round alike).
"""

import itertools
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from idp_jax.inference.buckets import bucket
from idp_jax.inference.generation import check_input, decode_step, pad_left, prefill
from idp_jax.inference.sampling import Pick
from idp_jax.inference.text import GrowingText
from idp_jax.models import KV, Decoder
from idp_jax.models.storage import layers_apart
from idp_jax.recover import Repaired


@dataclass(frozen=True)
class Completion:
    """What a prompt was continued by.

    Attributes:
        text: the new text, without what ended it.
        tokens: how many were made, one that ended it included.
        choice: the number of the pool's prompt, or None where there was nothing to choose.
    """

    text: str
    finish_reason: Literal["stop", "length"]
    tokens: int
    choice: int | None


@dataclass
class _Row:
    """A prompt that is being continued."""

    number: int
    text: GrowingText
    choice: int | None
    tokens: int = 0

    def hear(self, token: int, ends: frozenset[int], limit: int) -> tuple[str, Completion | None]:
        """The text that a token adds, and the whole where it is the last."""
        if token < 0:
            raise ValueError(
                f"the logits behind prompt {self.number} are not finite (NaN or infinity): the "
                "model, its adapter or its selector gives numbers that cannot be computed with"
            )
        self.tokens += 1
        new = "" if token in ends else self.text.add(token)
        stopped = token in ends or self.text.stopped
        if not stopped and self.tokens < limit:
            return new, None
        new += self.text.end()
        reason = "stop" if stopped else "length"
        return new, Completion(self.text.given, reason, self.tokens, self.choice)


class _State(struct.PyTreeNode):
    """What the device holds of the rows.

    Attributes:
        cache: every row's keys and values.
        last: int32 [B], the newest token.
        count: int32 [B], how many there are.
        keys: random keys [B].
    """

    cache: KV
    last: jax.Array
    count: jax.Array
    keys: jax.Array


def complete(
    repaired: Repaired | Decoder,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int = 4,
    stop: Sequence[str] = (),
    stop_ids: Sequence[int] | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> Iterator[tuple[int, str, Completion | None]]:
    """Continues prompts, and gives the text as it comes.

    Args:
        tokenizer: the model's, which makes text of the new tokens.
        prompts: ids of each prompt.
        batch_size: rows that are decoded together.
        stop: strings before which a text ends.
        stop_ids: tokens that end a text; by default the model's own.
        temperature, top_k, top_p: as of `generate`.
        seed: of sampling; a prompt and a seed give one text, in whatever batch.

    Yields:
        A prompt's number, the text that is new of it (whole characters; nothing of a stop string),
        and, with the last, what it was continued by.

    Raises:
        ValueError: as `generate`, naming the prompt.
    """
    repaired = Repaired.of(repaired)
    config = repaired.decoder.config
    if batch_size < 1 or max_new_tokens < 1:
        raise ValueError(
            f"batch_size {batch_size} and max_new_tokens {max_new_tokens} must be at least 1"
        )
    pick = Pick.of(config.vocab_size, temperature, top_k, top_p)
    arrays = [_array(repaired, n, prompt, max_new_tokens) for n, prompt in enumerate(prompts)]
    if not arrays:
        return
    ends = frozenset(config.eos_token_ids if stop_ids is None else stop_ids)
    rows: list[_Row | None] = [None] * min(batch_size, len(arrays))
    room, ring = max(ids.shape[1] for ids, _ in arrays), bucket(max_new_tokens)
    state = _empty(repaired, len(rows), room + ring)
    layers, waiting = _apart(repaired.decoder), iter(enumerate(arrays))

    def heard(place: int, row: _Row, token: int) -> tuple[int, str, Completion | None]:
        new, done = row.hear(token, ends, max_new_tokens)
        rows[place] = row if done is None else None
        return row.number, new, done

    for step in itertools.count():
        for place in range(len(rows)):
            while rows[place] is None and (found := next(waiting, None)) is not None:
                number, (ids, mask) = found
                key = _key(seed, ids[mask > 0])
                state, token, choice = _admit(repaired, state, ids, mask, key, place, pick)
                chosen = None if choice is None else int(choice[0])
                yield heard(place, _Row(number, GrowingText(tokenizer, stop), chosen), int(token))
        if not any(rows):
            return
        slot = np.int32(state.cache.length - ring + step % ring)
        state, tokens = _step(repaired.decoder, layers, state, slot, pick)
        for place, token in enumerate(np.asarray(tokens).tolist()):
            if (row := rows[place]) is not None:
                yield heard(place, row, token)


def _array(repaired: Repaired, number: int, prompt: Sequence[int], max_new_tokens: int):
    """Ids and mask [1, T] of a prompt, T a length in use."""
    ids = np.asarray(prompt, np.int32).reshape(1, -1)
    mask = np.ones_like(ids)
    try:
        check_input(repaired, ids, mask, max_new_tokens)
    except ValueError as error:
        raise ValueError(f"prompt {number}: {error}") from None
    return pad_left(ids, mask)


def _key(seed: int, ids: np.ndarray) -> jax.Array:
    """A random key of a prompt's own, whatever its number."""
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(ids.tobytes()))


_apart = jax.jit(layers_apart)


def _empty(repaired: Repaired, rows: int, slots: int) -> _State:
    """Room for prompts and new tokens behind the prefix."""
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    read = lambda repaired, ids: prefill(repaired, ids, ids, slots - 1)[1]
    one = jax.eval_shape(read, repaired, ids)
    cache = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), one).repeat(rows)
    keys = jax.random.split(jax.random.key(0), rows)
    return _State(cache, jnp.zeros(rows, jnp.int32), jnp.zeros(rows, jnp.int32), keys)


@partial(jax.jit, donate_argnames="state")
def _admit(repaired: Repaired, state: _State, ids, mask, key, place, pick: Pick):
    """Reads a prompt into a row; also its first token (see `_told`) and the pool's choice."""
    before = 0 if repaired.prefix is None else repaired.prefix.length
    spare = state.cache.length - before - ids.shape[1]
    logits, cache = prefill(repaired, ids, mask, spare)
    token, finite = pick(logits, _draw(key[None], jnp.zeros(1, jnp.int32)))
    state = _State(
        state.cache.put(cache, place),
        state.last.at[place].set(token[0]),
        state.count.at[place].set(1),
        state.keys.at[place].set(key),
    )
    return state, _told(token, finite)[0], repaired.choose(ids, mask)


@partial(jax.jit, donate_argnames="state")
def _step(decoder: Decoder, layers, state: _State, slot, pick: Pick) -> tuple[_State, jax.Array]:
    """One more token for every row, see `_told`."""
    logits, cache = decode_step(decoder, state.last, state.cache, slot, layers)
    tokens, finite = pick(logits, _draw(state.keys, state.count))
    return _State(cache, tokens, state.count + 1, state.keys), _told(tokens, finite)


def _draw(keys: jax.Array, count: jax.Array):
    """Draws for every row by its own key, see `Pick`."""
    return lambda logits: jax.vmap(jax.random.categorical)(
        jax.vmap(jax.random.fold_in)(keys, count), logits
    )


def _told(tokens: jax.Array, finite: jax.Array) -> jax.Array:
    """Tokens, -1 where the logits that one was picked by are not finite."""
    return jnp.where(finite, tokens, -1)
