"""What training makes smaller: functions of the repaired model and a batch.

The invariant: an objective knows neither the adapter nor the optimiser. What it needs beside the
tokens, such as a teacher's word on them, comes in the batch.
"""

from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
import optax

from idp_jax.data.batch import Batch
from idp_jax.recover.repaired import Repaired, with_penalties


class Objective(Protocol):
    """A loss, differentiable (traceable)."""

    def __call__(self, repaired: Repaired, batch: Batch, /) -> tuple[jax.Array, dict]:
        """The loss, float32 scalar, and scalars by name to be logged beside it."""
        ...


def next_token(
    repaired: Repaired, batch: Batch, *, remat: bool = False
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean cross-entropy of every next token that the loss mask counts.

    Args:
        remat: recompute the layers in the backward pass instead of storing them.

    Raises:
        ValueError: the batch has segments, which attention does not yet keep apart.
    """
    if batch.segments is not None:
        raise ValueError("segments are given, but attention does not keep documents apart yet")
    tokens = batch.tokens
    past, penalties = repaired.serve(tokens)
    hidden = repaired.decoder.hidden(tokens, past=past, remat=remat)
    logits = repaired.decoder.logits(hidden[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    if batch.loss_mask is None:
        return _with(penalties, losses.mean())
    counted = batch.loss_mask[:, 1:].astype(bool)
    total = jnp.where(counted, losses, 0.0).sum()
    return _with(penalties, total / jnp.maximum(counted.sum(), 1).astype(jnp.float32))


def _with(penalties: dict[str, jax.Array], loss: jax.Array):
    return with_penalties(loss, penalties), penalties


OBJECTIVES: dict[str, Callable] = {"ce": next_token}
