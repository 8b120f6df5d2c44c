"""The training loop: steps, validations, checkpoints, and going on after an interruption.

The invariant: a run that is killed and started again ends with the same adapter and the same
metrics, bit for bit, as one that was not.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from idp_jax.data.batch import Batch
from idp_jax.models.decoder import Decoder
from idp_jax.processes import first_process
from idp_jax.recover.methods import Adapter
from idp_jax.sharding import shard, shard_batch
from idp_jax.training.checkpoint import Checkpointer
from idp_jax.training.metrics import Sink
from idp_jax.training.objectives import Objective
from idp_jax.training.step import TrainState, evaluate_step, keep_best, make_train_step


class BatchIterator(Iterator[Batch], Protocol):
    """Batches without end that know where they are, see `data.stream.Batches`."""

    def state(self) -> dict[str, Any]:
        """The place of the next batch, as plain JSON."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Goes to the place of a `state`."""
        ...


def fit(
    adapter: Adapter,
    decoder: Decoder,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    batches: BatchIterator,
    validation: Sequence[Batch],
    *,
    steps: int,
    evaluate_every: int,
    sinks: Sequence[Sink] = (),
    checkpointer: Checkpointer | None = None,
    mesh: jax.sharding.Mesh | None = None,
    progress: Callable[[int, int, str], None] = lambda step, steps, note: None,
) -> tuple[Adapter, dict[str, float]]:
    """Trains an adapter and returns the best one by validation loss.

    Args:
        batches: training batches; host arrays, which are placed on the mesh here.
        validation: batches of one size, whose mean next-token loss chooses the best adapter,
            whatever the objective: another one's value is no perplexity.
        steps: the number of the last step.
        evaluate_every: steps between two validations, each followed by a checkpoint.
        sinks: take the objective's loss and metrics of every step and the validation losses.
        checkpointer: a run found there goes on. None keeps nothing.
        progress: called after every step.

    Returns:
        The adapter with the lowest validation loss, and "validation_loss", "validation_perplexity"
        and "best_step" of it.
    """
    step_function = make_train_step(optimizer, objective)
    state = TrainState.start(shard(adapter, mesh), optimizer)
    found = None if checkpointer is None else checkpointer.restore(state)
    if found is not None:
        state, place = found
        batches.restore(place)
    # What was written after the checkpoint is trained, and written, again. Before the first
    # checkpoint that is everything, step 0 included.
    last = -1 if found is None else int(state.step)
    first_process(lambda: _drop_after(sinks, last), "metrics")

    def validate(state: TrainState) -> TrainState:
        state, loss = _validate(state, decoder, validation)
        _write(sinks, int(state.step), {"validation_loss": loss})
        if checkpointer is not None:
            checkpointer.save(int(state.step), state, batches.state())
        return state

    if found is None:
        state = validate(state)
    for number in range(int(state.step) + 1, steps + 1):
        state, values = step_function(state, decoder, shard_batch(next(batches), mesh))
        progress(number, steps, f"loss {float(values['loss']):.3f}")
        _write(sinks, number, values)
        if number % evaluate_every == 0 or number == steps:
            state = validate(state)
    return state.best_adapter, _summary(state)


def _validate(
    state: TrainState, decoder: Decoder, validation: Sequence[Batch]
) -> tuple[TrainState, jax.Array]:
    """The state with the best adapter so far, and the current one's validation loss."""
    losses = [evaluate_step(state.adapter, decoder, batch) for batch in validation]
    loss = jnp.stack(losses).mean()
    return keep_best(state, loss), loss


def _summary(state: TrainState) -> dict[str, float]:
    loss = float(state.best_loss)
    return {
        "validation_loss": loss,
        "validation_perplexity": float(np.exp(loss)),
        "best_step": int(state.best_step),
    }


def _drop_after(sinks: Sequence[Sink], step: int) -> None:
    for sink in sinks:
        sink.drop_after(step)


def _write(sinks: Sequence[Sink], step: int, values: Mapping[str, Any]) -> None:
    """Writes scalars, on process 0 alone."""
    if jax.process_index() == 0:
        plain = {name: float(value) for name, value in values.items()}
        for sink in sinks:
            sink.write(step, plain)
