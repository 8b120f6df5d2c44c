"""The optimiser step: gradient and optimiser state exist for the adapter alone.

The frozen model is an argument that is never differentiated, so "only the adapter changes" holds by
construction.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from idp_jax.config import Optimizer
from idp_jax.data.batch import Batch
from idp_jax.models.decoder import Decoder
from idp_jax.recover.methods import repair_for_training
from idp_jax.training.objectives import Objective, next_token


class TrainState(struct.PyTreeNode):
    """Everything that a run needs to go on, and the best adapter so far."""

    adapter: Any
    optimizer: Any
    step: jax.Array
    best_adapter: Any
    best_loss: jax.Array
    best_step: jax.Array

    @classmethod
    def start(cls, adapter: Any, optimizer: optax.GradientTransformation) -> "TrainState":
        """The state before the first step."""
        # The state is donated: no leaf may share a buffer with another, or with the caller's.
        return cls(
            adapter=jax.tree.map(jnp.copy, adapter),
            optimizer=optimizer.init(adapter),
            step=jnp.zeros((), jnp.int32),
            best_adapter=jax.tree.map(jnp.copy, adapter),
            best_loss=jnp.full((), jnp.inf, jnp.float32),
            best_step=jnp.zeros((), jnp.int32),
        )


def make_optimizer(
    settings: Optimizer, learning_rate: float, steps: int
) -> optax.GradientTransformation:
    """AdamW behind a global-norm clip, with linear warm-up and linear decay to 0, or neither."""
    if settings.schedule == "constant":
        rate = optax.constant_schedule(learning_rate)
    else:
        warmup = max(1, min(round(settings.warmup * steps), steps))
        rate = optax.join_schedules(
            [
                optax.linear_schedule(learning_rate / warmup, learning_rate, warmup - 1 or 1),
                optax.linear_schedule(learning_rate, 0.0, max(1, steps - warmup)),
            ],
            [warmup],
        )
    return optax.chain(
        optax.clip_by_global_norm(settings.clip_norm),
        optax.adamw(rate, weight_decay=settings.weight_decay),
    )


def make_train_step(
    optimizer: optax.GradientTransformation,
    objective: Objective,
    *,
    steps: int = 1,
    key: jax.Array | None = None,
) -> Callable:
    """A compiled step: (state, decoder, batch) -> (state, metrics); the state is donated.

    Args:
        steps: of the whole training, which a schedule of the adapter's own goes by.
        key: of what is drawn at random in training, folded with the number of the step.
    """
    key = jax.random.key(0) if key is None else key

    def loss(adapter: Any, decoder: Decoder, batch: Batch, step: jax.Array):
        share = step.astype(jnp.float32) / jnp.float32(steps)
        repaired = repair_for_training(adapter, decoder, share, jax.random.fold_in(key, step))
        return objective(repaired, batch)

    def step(state: TrainState, decoder: Decoder, batch: Batch):
        (value, parts), gradient = jax.value_and_grad(loss, has_aux=True)(
            state.adapter, decoder, batch, state.step
        )
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.adapter)
        adapter = optax.apply_updates(state.adapter, updates)
        metrics = {"loss": value, **parts, "gradient_norm": optax.tree.norm(gradient)}
        return state.replace(
            adapter=adapter, optimizer=optimizer_state, step=state.step + 1
        ), metrics

    return jax.jit(step, donate_argnums=0)


@jax.jit
def evaluate_step(adapter: Any, decoder: Decoder, batch: Batch) -> jax.Array:
    """Mean next-token cross-entropy of a batch under the repaired model, float32 scalar."""
    return next_token(adapter.repair(decoder), batch)[0]


@jax.jit
def keep_best(state: TrainState, loss: jax.Array) -> TrainState:
    """Remembers the current adapter where its validation loss is the lowest so far."""
    better = loss < state.best_loss
    pick = lambda new, old: jnp.where(better, new, old)
    return state.replace(
        best_adapter=jax.tree.map(pick, state.adapter, state.best_adapter),
        best_loss=pick(loss, state.best_loss),
        best_step=pick(state.step, state.best_step),
    )
