"""How long a prompt and the tokens after it take, compilation left out."""

import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from idp_jax.inference.generation import decode_step, prefill
from idp_jax.models import KV, Decoder
from idp_jax.models.block import Block
from idp_jax.models.storage import layers_apart
from idp_jax.recover import Repaired


def time_generation(
    repaired: Repaired, ids: np.ndarray, *, new_tokens: int, repeats: int
) -> np.ndarray:
    """Times greedy generation, once everything has run before.

    Args:
        ids: int32 [B, T], prompts.
        new_tokens: decode steps timed together.

    Returns:
        float64 [repeats, 2]: seconds of the prompts, and of all new tokens.
    """
    return interleaved({"": repaired}, ids, new_tokens=new_tokens, repeats=repeats)[""]


def interleaved(
    variants: dict[str, Repaired], ids: np.ndarray, *, new_tokens: int, repeats: int
) -> dict[str, np.ndarray]:
    """As `time_generation`, of several in turn, so that a slow minute is slow for all of them.

    Returns:
        By name, float64 [repeats, 2].
    """
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    for _ in range(repeats + 1):
        for name, repaired in variants.items():
            runs[name].append(_timed(repaired, jnp.asarray(ids), new_tokens))
    return {name: np.asarray(times[1:]) for name, times in runs.items()}


def time_tokens(repaired: Repaired, ids: np.ndarray, *, new_tokens: int) -> np.ndarray:
    """Times one greedy generation token by token, as whoever reads along would.

    The first token's time is that of the prompt, a pool's choice included. Each further one is a
    call of its own, so that it also holds what starting a program takes.

    Args:
        ids: int32 [B, T], prompts.

    Returns:
        float64 [new_tokens]: seconds from one token of all rows to the next, the first from the
        start; compilation is part of the first call for every shape.
    """
    text, decoder, seconds = jnp.asarray(ids), repaired.decoder, []
    layers = jax.block_until_ready(_apart(decoder))
    jax.block_until_ready(text)
    before = time.perf_counter()
    token, cache = _read(repaired, text, slots=new_tokens)
    for step in range(new_tokens):
        if step:
            slot = jnp.int32(cache.length - new_tokens + step - 1)
            token, cache = _step(decoder, token, cache, slot, layers)
        jax.block_until_ready(token)
        now = time.perf_counter()
        seconds.append(now - before)
        before = now
    return np.asarray(seconds)


_apart = jax.jit(layers_apart)


@partial(jax.jit, static_argnames="slots")
def _read(repaired: Repaired, ids: jax.Array, *, slots: int):
    logits, cache = prefill(repaired, ids, jnp.ones_like(ids), slots)
    return logits.argmax(-1).astype(jnp.int32), cache


@partial(jax.jit, donate_argnames="cache")
def _step(
    decoder: Decoder,
    token: jax.Array,
    cache: KV,
    slot: jax.Array,
    layers: tuple[Block, ...] | None,
) -> tuple[jax.Array, KV]:
    logits, cache = decode_step(decoder, token, cache, slot, layers)
    return logits.argmax(-1).astype(jnp.int32), cache


@jax.jit
def _decode(decoder: Decoder, first: jax.Array, cache, steps: jax.Array):
    start = jnp.int32(cache.length) - steps
    layers = layers_apart(decoder)

    def advance(step, state):
        logits, cache = decode_step(decoder, state[0], state[1], start + step, layers)
        return logits.argmax(-1).astype(jnp.int32), cache

    return jax.lax.fori_loop(jnp.int32(0), steps, advance, (first, cache))[0]


def _timed(repaired: Repaired, ids: jax.Array, new_tokens: int) -> tuple[float, float]:
    start = time.perf_counter()
    first, cache = jax.block_until_ready(_read(repaired, ids, slots=new_tokens))
    middle = time.perf_counter()
    jax.block_until_ready(_decode(repaired.decoder, first, cache, jnp.int32(new_tokens)))
    return middle - start, time.perf_counter() - middle
