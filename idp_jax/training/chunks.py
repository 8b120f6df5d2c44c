"""Sums over the positions of a batch whose logits never exist all at once, forward or backward.

A chunk is a stretch of time of every row, so that a batch which is cut over devices stays where it
lies. The gradient of a chunk is made right behind its value, while its logits are there: nothing is
kept for the backward pass but d/d hidden, [B, T, E]. The head's own gradient is summed over the
chunks where the head is being trained, and not computed where it is frozen (`symbolic_zeros` tells
the two apart).
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from idp_jax.models.head import Head
from idp_jax.models.likelihood import POSITIONS_AT_ONCE
from idp_jax.sharding import parts

Score = Callable[[jax.Array, Any, Any], tuple[jax.Array, Any]]


def split(tree: Any, rows: int, time: int) -> Any:
    """Arrays [B, T, ...] as [C, B, T / C, ...], the last chunk filled up with zeros."""
    mesh = jax.sharding.get_abstract_mesh()
    rows = rows if mesh.empty else max(1, rows // parts("batch", mesh.shape))
    count = max(1, math.ceil(rows * time / POSITIONS_AT_ONCE))
    width = math.ceil(time / count)
    count = math.ceil(time / width)

    def cut(x: jax.Array) -> jax.Array:
        spare = [(0, 0), (0, count * width - time)] + [(0, 0)] * (x.ndim - 2)
        padded = jnp.pad(x, spare).reshape(x.shape[0], count, width, *x.shape[2:])
        return jnp.moveaxis(padded, 1, 0)

    return jax.tree.map(cut, tree)


def join(tree: Any, time: int) -> Any:
    """Chunks [C, B, W, ...] as arrays [B, T, ...]: `split` turned back."""

    def whole(x: jax.Array) -> jax.Array:
        rows = jnp.moveaxis(x, 0, 1)
        return rows.reshape(rows.shape[0], -1, *rows.shape[3:])[:, :time]

    return jax.tree.map(whole, tree)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def summed(score: Score, hidden: jax.Array, head: Head, beside: Any, shared: Any):
    """The sum over chunks of what `score` finds in the logits of each.

    Args:
        score: (logits float32 [B, W, V], beside [B, W, ...], shared) -> a float32 scalar, which may
            be differentiated, and a pytree of others, which may not. It closes over no arrays.
        hidden: [B, T, E], differentiable.
        head: differentiable.
        beside: pytree of arrays [B, T, ...]; of chunks that are filled up, zeros.
        shared: pytree that every chunk is given whole.
    """

    def step(total, xs):
        states, rows = xs
        found = score(head(states), rows, shared)
        return jax.tree.map(jnp.add, total, found), None

    chunks = split((hidden, beside), *hidden.shape[:2])
    return jax.lax.scan(step, _nothing(score, head, chunks, shared), chunks)[0]


def _nothing(score: Score, head: Head, chunks: Any, shared: Any) -> Any:
    first = lambda head, chunks, shared: score(
        head(chunks[0][0]), jax.tree.map(lambda x: x[0], chunks[1]), shared
    )
    found = jax.eval_shape(first, head, chunks, shared)
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), found)


def _forward(score: Score, hidden: Any, head: Any, beside: Any, shared: Any):
    trained = head.kernel.perturbed
    hidden, head, beside, shared = jax.tree.map(lambda x: x.value, (hidden, head, beside, shared))

    def value(states, kernel, rows):
        return score(head.replace(kernel=kernel)(states), rows, shared)

    def step(carry, xs):
        total, slope = carry
        states, rows = xs
        wanted = (0, 1) if trained else (0,)
        found, (d_states, *d_kernel) = jax.value_and_grad(value, wanted, has_aux=True)(
            states, head.kernel, rows
        )
        if trained:
            slope = slope + d_kernel[0].astype(jnp.float32)
        return (jax.tree.map(jnp.add, total, found), slope), d_states

    chunks = split((hidden, beside), *hidden.shape[:2])
    slope = jnp.zeros(head.kernel.shape, jnp.float32) if trained else None
    start = _nothing(score, head, chunks, shared), slope
    (total, slope), d_hidden = jax.lax.scan(step, start, chunks)
    slope = None if slope is None else head.replace(kernel=slope.astype(head.kernel.dtype))
    return total, (join(d_hidden, hidden.shape[1]), slope)


def _backward(score: Score, kept: tuple, cotangents: tuple):
    by = cotangents[0]
    if isinstance(by, SymbolicZero):
        return None, None, None, None
    scaled = jax.tree.map(lambda slope: slope * by.astype(slope.dtype), kept)
    return *scaled, None, None


summed.defvjp(_forward, _backward, symbolic_zeros=True)
