"""The training loop: steps, validations, checkpoints, and going on after an interruption.

The invariant: a run that is killed or interrupted and started again ends with the same adapter and
the same metrics, bit for bit, as one that was not.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax

from idp_jax.data.batch import Batch
from idp_jax.jobs.signals import Interrupted
from idp_jax.models.decoder import Decoder
from idp_jax.processes import first_process
from idp_jax.recover.methods import Adapter
from idp_jax.sharding import shard, shard_batch
from idp_jax.training.checkpoint import Checkpointer
from idp_jax.training.checks import check_windows
from idp_jax.training.metrics import Sink
from idp_jax.training.objectives import Objective
from idp_jax.training.step import TrainState, evaluate_step, keep_best, make_train_step

_UNVALIDATED = "unvalidated"  # beside the place in the data: a checkpoint before a validation
_DIVERGED = 0.1  # nats above the start, with no better step in between
_LOWER = "a lower --optimizer.learning-rate may help"


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
    checkpoint_every: int | None = None,
    sinks: Sequence[Sink] = (),
    checkpointer: Checkpointer | None = None,
    attach: Callable[[Batch], Batch] = lambda batch: batch,
    key: jax.Array | None = None,
    mesh: jax.sharding.Mesh | None = None,
    progress: Callable[[int, int, str], None] = lambda step, steps, note: None,
) -> tuple[Adapter, dict[str, float]]:
    """Trains an adapter and returns the best one by validation loss.

    Args:
        batches: training batches; host arrays, which are placed on the mesh here.
        validation: batches of one size, whose mean next-token loss chooses the best adapter,
            whatever the objective: another one's value is no perplexity.
        steps: the number of the last step.
        evaluate_every: steps between two validations.
        checkpoint_every: steps between two checkpoints; by default as between validations.
        sinks: take the objective's loss and metrics of every step and the validation losses.
        checkpointer: a run found there goes on. None keeps nothing.
        attach: puts what the objective needs beside the tokens into a batch, such as a teacher's
            word; it is given batches as they are placed on the mesh.
        key: of what is drawn at random in training.
        progress: called after every step and every batch of a validation. Where it raises
            Interrupted, the state is saved before that goes on.

    Returns:
        The adapter with the lowest validation loss, and "validation_loss", "validation_perplexity"
        and "best_step" of it.

    Raises:
        ValueError: a loss is not finite, training has only made the loss larger, the text has ids
            outside the vocabulary or is longer than learned positions, or the checkpoint is
            damaged, or of a longer run.
    """
    check_windows(adapter, decoder, validation)
    step_function = make_train_step(optimizer, objective, steps=steps, key=key)
    state = TrainState.start(shard(adapter, mesh), optimizer)
    run = _Run(state, decoder, batches, validation, steps, sinks, checkpointer, progress)
    run.restore()
    save_every = checkpoint_every or evaluate_every
    try:
        progress(run.step, steps, "")
        if run.unvalidated is not None:
            run.validate()
        for number in range(run.step + 1, steps + 1):
            batch = next(batches)
            decoder.check(batch.tokens)  # inside the step, an id that is none is clamped
            batch = attach(shard_batch(batch, mesh))
            run.state, values = step_function(run.state, decoder, batch)
            values = {name: float(value) for name, value in values.items()}
            run.take(values, evaluate_every, save_every)
            progress(number, steps, f"loss {values['loss']:.3f}")
    except Interrupted as stop:
        run.keep(stop)
        raise
    return run.state.best_adapter, _summary(run.state)


@dataclass
class _Run:
    """A training under way.

    Attributes:
        unvalidated: the numbers of the step where it stands while that one's validation is due,
            {} before the first step; None when there is none to do.
    """

    state: TrainState
    decoder: Decoder
    batches: BatchIterator
    validation: Sequence[Batch]
    steps: int
    sinks: Sequence[Sink]
    checkpointer: Checkpointer | None
    progress: Callable[[int, int, str], None]
    unvalidated: dict[str, float] | None = None

    @property
    def step(self) -> int:
        """The last step that was done."""
        return int(self.state.step)

    def restore(self) -> None:
        """Goes to the last checkpoint, or to the start where there is none."""
        found = None if self.checkpointer is None else self.checkpointer.restore(self.state)
        if found is None:
            self.unvalidated = {}
        else:
            self.state, place = found
            self.unvalidated = place.pop(_UNVALIDATED, None)
            self.batches.restore(place)
        if self.step > self.steps:
            raise ValueError(
                f"this run has been trained for {self.step} steps already, more than the "
                f"{self.steps} asked for; give more tokens, or another --out"
            )
        # What was written after the checkpoint is trained, and written, again; and so is a
        # validation that was due. Before the first checkpoint that is everything, step 0 included.
        last = self.step if self.unvalidated is None else self.step - 1
        first_process(lambda: _drop_after(self.sinks, last), "metrics")
        if self.unvalidated:
            self.write(self.unvalidated)

    def take(self, values: dict[str, float], evaluate_every: int, save_every: int) -> None:
        """Writes a step's numbers, and validates and saves where it is time to."""
        self.write(values)
        number, last = self.step, self.step == self.steps
        if number % evaluate_every == 0 or last:
            self.unvalidated = values
            self.validate()
        if number % save_every == 0 or last:
            self.save()

    def validate(self) -> None:
        """Measures the adapter as it is, and remembers it if it is the best."""
        losses = []
        for batch in self.validation:
            loss = evaluate_step(self.state.adapter, self.decoder, batch)
            losses.append(jax.block_until_ready(loss))
            self.progress(self.step, self.steps, "validation")
        loss = jnp.stack(losses).mean()
        self.write({"validation_loss": float(loss)})
        self.state = keep_best(self.state, loss)
        best = float(self.state.best_loss)
        never_better = self.step == self.steps and int(self.state.best_step) == 0
        if never_better and float(loss) > best + _DIVERGED:
            raise ValueError(
                f"training diverged: the validation loss rose from {best:.3f} before the first "
                f"step to {float(loss):.3f} at step {self.step} and was never lower; {_LOWER}"
            )
        self.unvalidated = None

    def write(self, values: Mapping[str, float]) -> None:
        """Tells the sinks, on process 0 alone; raises ValueError at a number that is not finite."""
        if jax.process_index() == 0:
            for sink in self.sinks:
                sink.write(self.step, values)
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if bad:
            name = "loss" if "loss" in bad else bad[0]
            raise ValueError(_not_finite(name.replace("_", " "), values[name], self.step))

    def save(self) -> None:
        """Writes a checkpoint of this step."""
        if self.checkpointer is not None:
            place = self.batches.state()
            if self.unvalidated is not None:
                place = {**place, _UNVALIDATED: self.unvalidated}
            self.checkpointer.save(self.step, self.state, place)

    def keep(self, stop: Interrupted) -> None:
        """Saves what an interruption would lose, and has it say so.

        Several processes may stand at different steps, so they go on from the last checkpoint.
        """
        if self.step and self.checkpointer is not None and jax.process_count() == 1:
            self.save()
            stop.place = f"step {self.step}"


def _not_finite(name: str, value: float, step: int) -> str:
    if not step:
        return (
            f"the {name} is {value} before the first step: it comes from the model or the text, "
            "not from training; check the model, or its --dtype"
        )
    return f"the {name} is {value} at step {step}: training diverged; {_LOWER}"


def _summary(state: TrainState) -> dict[str, float]:
    loss = float(state.best_loss)
    return {
        "validation_loss": loss,
        "validation_perplexity": perplexity_of(loss),
        "best_step": int(state.best_step),
    }


def perplexity_of(loss: float) -> float:
    """exp(loss), infinite where that is no float."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def _drop_after(sinks: Sequence[Sink], step: int) -> None:
    for sink in sinks:
        sink.drop_after(step)
