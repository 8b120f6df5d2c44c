"""The training loop: steps, validations, checkpoints, and going on after an interruption.

The invariant: a run that is killed or interrupted and started again ends with the same adapter and
the same metrics, bit for bit, as one that was not.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from idp_jax.data.batch import Batch
from idp_jax.jobs.signals import Interrupted
from idp_jax.models.decoder import Decoder
from idp_jax.processes import first_process
from idp_jax.recover.methods import Adapter
from idp_jax.sharding import Share, shard, shard_batch
from idp_jax.training.checkpoint import Checkpointer
from idp_jax.training.checks import check_windows
from idp_jax.training.feed import BatchIterator, Feed
from idp_jax.training.goodput import Goodput
from idp_jax.training.metrics import Sink
from idp_jax.training.objectives import Objective
from idp_jax.training.profile import Profile
from idp_jax.training.step import (
    TrainState,
    TrainStep,
    evaluate_step,
    keep_best,
    make_train_step,
)

_UNVALIDATED = "unvalidated"  # beside the place in the data: a checkpoint before a validation
_DIVERGED = 0.1  # nats above the start, with no better step in between
_LOWER = "a lower --optimizer.learning-rate may help"


class Diverged(ValueError):
    """Training made the model worse, or its numbers ceased to be finite."""


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
    patience: int | None = None,
    sinks: Sequence[Sink] = (),
    checkpointer: Checkpointer | None = None,
    schedule: optax.Schedule | None = None,
    passes: int = 1,
    attach: Callable[[Batch], Batch] = lambda batch: batch,
    key: jax.Array | None = None,
    mesh: jax.sharding.Mesh | None = None,
    share: Share | None = None,
    progress: Callable[[int, int, str], None] = lambda step, steps, note: None,
    begin: Callable[[jax.stages.Compiled, int], None] = lambda program, steps: None,
    keep_last: Callable[[Adapter], None] = lambda adapter: None,
    goodput: Goodput | None = None,
    fastest: float | None = None,
    profile: Profile | None = None,
) -> tuple[Adapter, dict[str, float]]:
    """Trains an adapter and returns the best one by validation loss.

    Args:
        batches: training batches; host arrays, which are placed on the mesh here.
        validation: batches of one size, placed likewise, whose mean loss of all next tokens chooses
            the best adapter, whatever the objective: another one's value is no perplexity.
        steps: the number of the last step; at 0 the start is validated, and nothing is trained.
        evaluate_every: steps between two validations.
        checkpoint_every: steps between two checkpoints; by default as between validations.
        patience: validations without a better adapter after which training ends; None for no end.
        sinks: take the objective's loss and metrics of every step, its tokens a second (and with
            `fastest` its MFU), and the validation losses.
        checkpointer: a run found there goes on. None keeps nothing.
        schedule: the optimizer's learning rates, for the sinks.
        passes: in which every batch goes through the model, for less memory.
        attach: puts what the objective needs beside the tokens into a batch, such as a teacher's
            word; it is given batches as they are placed on the mesh.
        key: of what is drawn at random in training.
        share: of every training batch, which `batches` gives; None for all of it.
        progress: called after every step and every batch of a validation. Where it raises
            Interrupted, the state is saved before that goes on.
        begin: told the compiled step, and the number of steps to do, before the first validation;
            not called where no step is left.
        keep_last: takes the adapter as it is at the end.
        goodput: is told what the time goes to.
        fastest: tokens a second at the devices' peak, where that is known.
        profile: is told when a trace may begin and end.

    Returns:
        The adapter with the lowest validation loss, and "validation_loss", "validation_perplexity"
        and "best_step" of it; "last_step", and whether patience ended the training
        ("stopped_early").

    Raises:
        Diverged: a loss ceased to be finite, or training has only made it larger.
        ValueError: a loss is not finite from the start, the text has ids outside the vocabulary or
            is longer than learned positions, or the checkpoint is damaged, or of a longer run.
    """
    check_windows(adapter, decoder, validation)
    train_step = make_train_step(
        optimizer, objective, steps=steps, key=key, schedule=schedule, passes=passes
    )
    state = TrainState.start(shard(adapter, mesh), optimizer)
    # Counters are placed, too, so that a step's outcome has the form of what it was given.
    state = jax.tree.map(lambda leaf: leaf if leaf.committed else shard(leaf, mesh), state)

    def prepare(batch: Batch) -> Batch:
        decoder.check(batch.tokens)  # inside the step, an id that is none is clamped
        return attach(shard_batch(batch, mesh, share))

    feed = Feed(batches, prepare)
    held_out = [shard_batch(batch, mesh) for batch in validation]
    goodput, profile = goodput or Goodput(), profile or Profile(Path(), 0)
    run = _Run(
        *(state, decoder, feed, held_out, steps, patience, sinks, checkpointer, progress),
        *(goodput, fastest, profile),
    )
    with goodput.spending("loading"):
        run.restore()
    save_every = checkpoint_every or evaluate_every
    try:
        progress(run.step, steps, "")
        if not run.done:
            with goodput.spending("input"):
                batch = feed.look()
            with goodput.spending("compiling"):
                program = train_step.compiled(run.state, decoder, batch)
            begin(program, steps - run.step)
        if run.unvalidated is not None:
            run.validate()
        while not run.done:
            run.advance(train_step, evaluate_every, save_every)
    except Interrupted as stop:
        run.keep(stop)
        raise
    finally:
        profile.close(run.step)
    keep_last(run.state.adapter)
    return run.state.best_adapter, _summary(run)


@dataclass
class _Unread:
    """The numbers of a step that may still be under way."""

    step: int
    values: Mapping[str, jax.Array]
    tokens: int


@dataclass
class _Run:
    """A training under way.

    A step is begun before the numbers of the one before it are read, so that the device never waits
    for the host: they are written a step late, but before anything is validated or saved.

    Attributes:
        step: the last step that was begun.
        waited: validations since the best one.
        unread: its numbers, until they are read.
        last: the last numbers that were read.
        since: when that was, or when the first step after other work was begun.
        stalled: seconds since then that the loop waited for text and no step was under way.
        first: the last step that an earlier call began.
        unvalidated: the numbers of the step where it stands while that one's validation is due,
            {} before the first step; None when there is none to do.
    """

    state: TrainState
    decoder: Decoder
    batches: Feed
    validation: Sequence[Batch]
    steps: int
    patience: int | None
    sinks: Sequence[Sink]
    checkpointer: Checkpointer | None
    progress: Callable[[int, int, str], None]
    goodput: Goodput
    fastest: float | None
    profile: Profile
    unvalidated: dict[str, float] | None = None
    step: int = 0
    waited: int = 0
    unread: _Unread | None = None
    last: dict[str, float] = field(default_factory=dict)
    since: float = 0.0
    stalled: float = 0.0
    first: int = 0

    @property
    def stopped(self) -> bool:
        """Whether patience has ended it."""
        return self.patience is not None and self.waited >= self.patience

    @property
    def done(self) -> bool:
        """Whether there is no step left to do."""
        return self.step >= self.steps or self.stopped

    def restore(self) -> None:
        """Goes to the last checkpoint, or to the start where there is none."""
        found = None if self.checkpointer is None else self.checkpointer.restore(self.state)
        if found is None:
            self.unvalidated = {}
        else:
            self.state, place = found
            self.step, self.waited = int(self.state.step), int(self.state.waited)
            self.unvalidated = place.pop(_UNVALIDATED, None)
            self.batches.restore(place)
        self.first = self.step
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

    def advance(self, train_step: TrainStep, evaluate_every: int, save_every: int) -> None:
        """Begins a step, reads the one before, and validates and saves where it is time to."""
        notes = []
        if self.profile.begins(self.step - self.first):
            notes += self.catch_up()
            self.profile.start(self.step + 1)
        if self.unread is None:
            self.since, self.stalled = time.perf_counter(), 0.0
        batch = self._take()
        with jax.profiler.StepTraceAnnotation("train", step_num=self.step + 1):
            self.state, values = train_step(self.state, self.decoder, batch)
        self.step += 1
        before, self.unread = self.unread, _Unread(self.step, values, batch.tokens.size)
        notes += [] if before is None else [self._tell(before)]
        if self.profile.ends(self.step):
            notes += self.catch_up()
            self.profile.stop(self.step)
        validates = self.step % evaluate_every == 0 or self.step >= self.steps
        saves = self.step % save_every == 0
        if validates or saves:
            notes += self.catch_up()
        if validates:
            self.unvalidated = self.last
        for number, note in notes:  # which may raise Interrupted
            self.progress(number, self.steps, note)
        if validates:
            self.validate()
        if saves or self.done:
            self.save()

    def _take(self) -> Batch:
        """The next batch."""
        began = time.perf_counter()
        try:
            batch = self.batches.take()
        except Exception:
            self.catch_up()  # the step before went well: its numbers are to be told
            raise
        loss: Any = None if self.unread is None else self.unread.values["loss"]
        if loss is None or loss.is_ready():
            self.stalled += time.perf_counter() - began
        return batch

    def catch_up(self) -> list[tuple[int, str]]:
        """Waits for the step that is under way, if there is one, and writes its numbers."""
        unread, self.unread = self.unread, None
        return [] if unread is None else [self._tell(unread)]

    def _tell(self, unread: _Unread) -> tuple[int, str]:
        """Writes a step's numbers; returns it, and a note for people."""
        values = {name: float(value) for name, value in unread.values.items()}
        now = time.perf_counter()
        values["tokens_per_second"] = speed = unread.tokens / (now - self.since)
        note = f"loss {values['loss']:.3f}, {speed:,.0f} tokens/s"
        if self.fastest is not None:
            values["mfu"] = speed / self.fastest
            note += f", MFU {values['mfu']:.0%}"
        self.goodput.seconds["steps"] += now - self.since - self.stalled
        self.goodput.seconds["input"] += self.stalled
        self.goodput.tokens += unread.tokens
        self.since, self.stalled, self.last = now, 0.0, values
        self.write(values, unread.step)
        return unread.step, note

    def validate(self) -> None:
        """Measures the adapter as it is, and remembers it if it is the best."""
        losses, counts = [], []
        with self.goodput.spending("validation"):
            for batch in self.validation:
                loss, count = jax.block_until_ready(
                    evaluate_step(self.state.adapter, self.decoder, batch)
                )
                losses.append(loss)
                counts.append(count)
                self.progress(self.step, self.steps, "validation")
        loss = jnp.average(jnp.stack(losses), weights=jnp.stack(counts))
        self.write({"validation_loss": float(loss)})
        self.state = keep_best(self.state, loss)
        best, self.waited = float(self.state.best_loss), int(self.state.waited)
        never_better = self.done and int(self.state.best_step) == 0
        if never_better and float(loss) > best + _DIVERGED:
            raise Diverged(
                f"training diverged: the validation loss rose from {best:.3f} before the first "
                f"step to {float(loss):.3f} at step {self.step} and was never lower; {_LOWER}"
            )
        self.unvalidated = None

    def write(self, values: Mapping[str, float], step: int | None = None) -> None:
        """Tells the sinks, on process 0 alone; raises ValueError at a number that is not finite.

        Args:
            step: of the numbers; the last one by default.
        """
        step = self.step if step is None else step
        if jax.process_index() == 0:
            for sink in self.sinks:
                sink.write(step, values)
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if bad:
            name = "loss" if "loss" in bad else bad[0]
            raise _not_finite(name.replace("_", " "), values[name], step)

    def save(self) -> None:
        """Writes a checkpoint of this step."""
        if self.checkpointer is not None:
            place = self.batches.state()
            if self.unvalidated is not None:
                place = {**place, _UNVALIDATED: self.unvalidated}
            with self.goodput.spending("saving"):
                self.checkpointer.save(self.step, self.state, place)

    def keep(self, stop: Interrupted) -> None:
        """Saves what an interruption would lose, and has it say so.

        Several processes may stand at different steps, so they go on from the last checkpoint.
        """
        if self.step and self.checkpointer is not None and jax.process_count() == 1:
            self.catch_up()
            self.save()
            self.checkpointer.wait()
            stop.place = f"step {self.step}"


def _not_finite(name: str, value: float, step: int) -> ValueError:
    if not step:
        return ValueError(
            f"the {name} is {value} before the first step: it comes from the model or the text, "
            "not from training; check the model, or its --dtype"
        )
    if step == 1 and name != "validation loss":  # which alone is of the values behind the step
        return ValueError(
            f"the {name} is {value} at step 1, before anything was trained: it comes from the text "
            "or from the objective, its weights, its teacher and their temperature; check those, "
            "or the --dtype"
        )
    return Diverged(f"the {name} is {value} at step {step}: training diverged; {_LOWER}")


def _summary(run: _Run) -> dict[str, float]:
    loss = float(run.state.best_loss)
    return {
        "validation_loss": loss,
        "validation_perplexity": perplexity_of(loss),
        "best_step": int(run.state.best_step),
        "last_step": run.step,
        "stopped_early": run.step < run.steps,
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
