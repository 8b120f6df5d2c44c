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
from idp_jax.recover.methods import repair_for_training, trained
from idp_jax.recover.repaired import Repaired
from idp_jax.training.accumulate import in_passes
from idp_jax.training.objectives import Objective, counted_targets, next_token


class TrainState(struct.PyTreeNode):
    """Everything that a run needs to go on, and the best adapter so far.

    Attributes:
        waited: int32 scalar, validations since that of the best adapter.
    """

    adapter: Any
    optimizer: Any
    step: jax.Array
    best_adapter: Any
    best_loss: jax.Array
    best_step: jax.Array
    waited: jax.Array

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
            waited=jnp.zeros((), jnp.int32),
        )


def make_schedule(settings: Optimizer, learning_rate: float, steps: int) -> optax.Schedule:
    """The learning rate of a step, counted from 0: a linear rise, then a decay to 0; or constant.

    The decay is a line, or half a wave of the cosine (Loshchilov & Hutter 2017, one cycle).
    """
    if settings.schedule == "constant":
        return optax.constant_schedule(learning_rate)
    warmup = max(1, min(round(settings.warmup * steps), steps))
    left = max(1, steps - warmup)
    if settings.schedule == "cosine":
        decay = optax.cosine_decay_schedule(learning_rate, left)
    else:
        decay = optax.linear_schedule(learning_rate, 0.0, left)
    rise = optax.linear_schedule(learning_rate / warmup, learning_rate, warmup - 1 or 1)
    return optax.join_schedules([rise, decay], [warmup])


def make_optimizer(
    settings: Optimizer, learning_rate: float, steps: int
) -> optax.GradientTransformation:
    """AdamW behind a global-norm clip, at the rates of `make_schedule`."""
    return optax.chain(
        optax.clip_by_global_norm(settings.clip_norm),
        optax.adamw(
            make_schedule(settings, learning_rate, steps), weight_decay=settings.weight_decay
        ),
    )


class TrainStep:
    """A compiled step: (state, decoder, batch) -> (state, metrics); the state is donated.

    It is compiled ahead, once for each form of its arguments, so that what it will take is known
    before it runs. A state leaves it where it came in: placed as it was.
    """

    def __init__(self, step: Callable):
        self._step = step
        self.programs: dict[Any, jax.stages.Compiled] = {}

    def compiled(self, state: TrainState, decoder: Decoder, batch: Batch) -> jax.stages.Compiled:
        """The program for arguments of this form, which may be shapes alone."""
        arguments = (state, decoder, batch)
        leaves, tree = jax.tree.flatten(arguments)
        form = (tree, *((x.shape, str(x.dtype), _placement(x)) for x in leaves))
        if form not in self.programs:
            places = jax.tree.map(_placement, state)
            out = (places, None) if jax.tree.leaves(places) else None
            jitted = jax.jit(self._step, donate_argnums=0, out_shardings=out)
            self.programs[form] = jitted.lower(*arguments).compile()
        return self.programs[form]

    def __call__(self, state: TrainState, decoder: Decoder, batch: Batch):
        return self.compiled(state, decoder, batch)(state, decoder, batch)


def _placement(leaf: Any) -> jax.sharding.Sharding | None:
    """Where an array was put, or the shape of one is to be; None where that is left open."""
    chosen = isinstance(leaf, jax.ShapeDtypeStruct) or getattr(leaf, "committed", False)
    return leaf.sharding if chosen else None


def make_train_step(
    optimizer: optax.GradientTransformation,
    objective: Objective,
    *,
    steps: int = 1,
    key: jax.Array | None = None,
    schedule: optax.Schedule | None = None,
    passes: int = 1,
) -> TrainStep:
    """The step of a training.

    Args:
        passes: in which a batch goes through the model; see `accumulate`.
        steps: of the whole training, which a schedule of the adapter's own goes by.
        key: of what is drawn at random in training, folded with the number of the step.
        schedule: the optimizer's learning rates, to be among the metrics.
    """
    key = jax.random.key(0) if key is None else key

    def loss(adapter: Any, decoder: Decoder, batch: Batch, step: jax.Array, number: jax.Array):
        share = step.astype(jnp.float32) / jnp.float32(steps)
        here = jax.random.fold_in(key, step)
        here = here if passes == 1 else jax.random.fold_in(here, number)
        repaired = repair_for_training(adapter, decoder, share, here)
        _check_choice(repaired, batch)
        return objective(repaired, batch)

    def step(state: TrainState, decoder: Decoder, batch: Batch):
        def slope(batch: Batch, number: jax.Array):
            of_loss = jax.value_and_grad(loss, has_aux=True)
            return of_loss(state.adapter, decoder, batch, state.step, number)

        (value, parts), gradient = in_passes(slope, batch, passes)
        # Numbers that are not trained count in no norm, and no weight decay reaches them.
        learns = trained(state.adapter)
        pick = lambda mask, new, old: new if mask is True else jnp.where(mask, new, old)
        gradient = jax.tree.map(lambda mask, g: pick(mask, g, jnp.zeros_like(g)), learns, gradient)
        with jax.named_scope("optimizer"):
            updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.adapter)
            adapter = optax.apply_updates(state.adapter, updates)
        adapter = jax.tree.map(pick, learns, adapter, state.adapter)
        metrics = {"loss": value, **parts, "gradient_norm": optax.tree.norm(gradient)}
        if schedule is not None:
            metrics["learning_rate"] = jnp.asarray(schedule(state.step), jnp.float32)
        return state.replace(
            adapter=adapter, optimizer=optimizer_state, step=state.step + 1
        ), metrics

    return TrainStep(step)


@jax.jit
def evaluate_step(adapter: Any, decoder: Decoder, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Mean next-token cross-entropy of a batch under the repaired model, and its targets' count.

    Both are float32 scalars.
    """
    repaired = adapter.repair(decoder)
    _check_choice(repaired, batch)
    count = counted_targets(batch).sum(dtype=jnp.float32)
    return next_token(repaired, batch)[1]["ce"], count


def _check_choice(repaired: Repaired, batch: Batch) -> None:
    """Refuses a choice of prompts for rows that hold several documents.

    Raises:
        ValueError: the repair is a pool, and the batch has segments.
    """
    choices = repaired.choices
    if choices > 1 and batch.segments is not None:
        raise ValueError(
            f"a pool of {choices} prompts chooses one for a whole row, not for each document; "
            "give --data.documents joined"
        )


@jax.jit
def keep_best(state: TrainState, loss: jax.Array) -> TrainState:
    """Remembers the current adapter where its validation loss is the lowest so far."""
    better = loss < state.best_loss
    pick = lambda new, old: jnp.where(better, new, old)
    return state.replace(
        best_adapter=jax.tree.map(pick, state.adapter, state.best_adapter),
        best_loss=pick(loss, state.best_loss),
        best_step=pick(state.step, state.best_step),
        waited=pick(jnp.zeros_like(state.waited), state.waited + 1),
    )
