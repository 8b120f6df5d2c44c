"""A run goes on after a signal as if there was none, and further where that is well defined."""

import json
import signal
from contextlib import closing
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idp_jax.config import Optimizer
from idp_jax.data.stream import TrainingText
from idp_jax.jobs.signals import Interrupted
from idp_jax.models import Decoder
from idp_jax.recover import LoraAdapter, PrefixAdapter, SoftPrompt
from idp_jax.sharding import make_mesh, shard
from idp_jax.training import Checkpointer, Diverged, JsonLines, fit, loop, next_token
from idp_jax.training.step import make_optimizer, make_train_step
from tests.helpers import tiny_decoder

LENGTH, STEPS = 16, 12
KINDS = {"prompt": SoftPrompt, "prefix": PrefixAdapter, "lora": LoraAdapter}


@pytest.fixture(scope="module", autouse=True)
def as_a_run_is():
    """optax raises floats to int32 powers; runs of equal settings share their compiled step."""
    with jax.numpy_dtype_promotion("standard"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_train_step", cache(make_train_step))
        yield


optimizer_of = cache(make_optimizer)
LINEAR = Optimizer()
CONSTANT = Optimizer(schedule="constant")


@cache
def model() -> Decoder:
    """A frozen model of one layer."""
    return tiny_decoder("llama", num_layers=1)


def run_fit(folder, kind="prompt", *, steps=STEPS, settings=LINEAR, rate=0.05, **rest):
    """`fit` as a job puts it together, with validations and checkpoints out of step."""
    rng = np.random.default_rng(1)
    windows = rng.choice([7, 30, 55, 81], (24, LENGTH)).astype(np.int32)
    text = TrainingText("", None, LENGTH, windows[-4:], windows[:-4], 0, 0)
    with (
        closing(JsonLines(folder / "metrics.jsonl")) as metrics,
        Checkpointer(folder / "checkpoints") as checkpointer,
    ):
        options = {
            "objective": next_token,
            "optimizer": optimizer_of(settings, rate, steps),
            "decoder": model(),
            "evaluate_every": 4,
            "checkpoint_every": 3,
        }
        return fit(
            KINDS[kind].init(model(), 2, jax.random.key(5)),
            batches=text.batches(2),
            validation=text.validation_batches(2),
            steps=steps,
            sinks=[metrics],
            checkpointer=checkpointer,
            **(options | rest),
        )


def stop_at(*moments):
    """A progress callback that is interrupted at the first of (step, word of the note)."""

    def progress(number, steps, note):
        if (number, note.partition(" ")[0]) in moments:
            raise Interrupted(signal.SIGTERM)

    return progress


def same(first, second) -> bool:
    """Equal bit for bit."""
    pairs = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    return all((np.asarray(x) == np.asarray(y)).all() for x, y in pairs)


def text_of(folder) -> str:
    return (folder / "metrics.jsonl").read_text()


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_run_ends_as_one_that_was_not(tmp_path, kind):
    adapter, summary = run_fit(tmp_path / "whole", kind)
    folder, places = tmp_path / "other", []
    # Before the first step, behind a step, within a validation and behind one, twice in the same.
    for moment in [(0, "validation"), (0, ""), (2, "loss"), (4, "validation"), (4, "validation"),
                   (4, ""), (5, "loss"), (8, "loss"), (12, "validation")]:  # fmt: skip
        with pytest.raises(Interrupted) as stop:
            run_fit(folder, kind, progress=stop_at(moment))
        places.append(stop.value.place)
    # A step's numbers are told when the next one has begun, which is kept, too.
    steps = [f"step {number}" for number in (3, 4, 4, 4, 6, 8, 12)]
    assert places == [None, None, *steps]
    found, again = run_fit(folder, kind)
    assert same(found, adapter) and again == summary
    assert text_of(folder) == text_of(tmp_path / "whole")


def test_an_interruption_loses_no_step(tmp_path):
    with pytest.raises(Interrupted):
        run_fit(tmp_path, progress=stop_at((5, "loss")))
    seen = []
    run_fit(tmp_path, progress=lambda number, steps, note: seen.append(number))
    assert seen[:2] == [6, 7]


def test_a_killed_run_goes_on_from_its_checkpoint(tmp_path):
    class Killed(Exception):
        pass

    def kill(number, steps, note):
        if number == 8:
            raise Killed

    adapter, _ = run_fit(tmp_path / "whole")
    with pytest.raises(Killed):
        run_fit(tmp_path / "other", progress=kill)
    seen = []
    found, _ = run_fit(tmp_path / "other", progress=lambda number, *rest: seen.append(number))
    assert seen[:2] == [6, 7]  # a checkpoint every 3 steps, though validations are every 4
    assert same(found, adapter) and text_of(tmp_path / "other") == text_of(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize(("before", "behind"), [(None, {"data": 2}), ({"data": 2}, None),
                                                ({"fsdp": 2}, {"model": 2})])  # fmt: skip
def test_a_run_goes_on_on_another_mesh(tmp_path, before, behind):
    def on(shape, **rest):
        mesh = None if shape is None else make_mesh(shape, jax.devices()[:2])
        if mesh is None:
            return run_fit(tmp_path / "other", "lora", **rest)
        with jax.set_mesh(mesh):
            decoder = shard(model(), mesh)
            return run_fit(tmp_path / "other", "lora", mesh=mesh, decoder=decoder, **rest)

    _, summary = run_fit(tmp_path / "whole", "lora")
    with pytest.raises(Interrupted):
        on(before, progress=stop_at((5, "loss")))
    _, found = on(behind)
    assert found["validation_loss"] == pytest.approx(summary["validation_loss"], rel=1e-4)


def test_a_constant_rate_can_be_trained_further(tmp_path):
    losses = lambda folder: [
        row["loss"] for row in map(json.loads, text_of(folder).splitlines()) if "loss" in row
    ]
    run_fit(tmp_path / "whole", settings=CONSTANT)
    for steps in (5, STEPS):
        run_fit(tmp_path / "other", settings=CONSTANT, steps=steps)
    assert losses(tmp_path / "other") == losses(tmp_path / "whole")
    with pytest.raises(ValueError, match="for 12 steps already, more than the 7 asked for"):
        run_fit(tmp_path / "other", settings=CONSTANT, steps=7)


def truncate(folder) -> None:
    """Cuts every file of the arrays in half."""
    for file in folder.rglob("*"):
        if file.is_file() and "state" in file.parts:
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty(folder) -> None:
    """Removes the arrays."""
    for file in folder.rglob("*"):
        if file.is_file() and file.parent.name == "state":
            file.unlink()


def junk(folder) -> None:
    """Puts other words where the place in the text stood."""
    for file in (folder / "12" / "data").rglob("*"):
        if file.is_file():
            file.write_text("[1, 2")


@pytest.mark.parametrize("damage", [truncate, empty, junk])
def test_a_damaged_checkpoint_is_named_with_what_to_remove(tmp_path, damage):
    adapter, _ = run_fit(tmp_path)
    folder = tmp_path / "checkpoints"
    damage(folder)
    with pytest.raises(
        ValueError, match=f"checkpoint in {folder}/12 .*remove {folder} to"
    ) as caught:
        run_fit(tmp_path)
    assert "\n" not in str(caught.value)
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    assert same(run_fit(tmp_path)[0], adapter)


def test_a_model_that_is_not_finite_is_not_trained(tmp_path):
    bad = jax.tree.map(lambda leaf: leaf * jnp.nan, model())
    with pytest.raises(ValueError, match="validation loss is nan before the first step: .*model"):
        run_fit(tmp_path, decoder=bad)
    assert json.loads(text_of(tmp_path)) == {"step": 0, "validation_loss": None}


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("kind", ["prompt", "lora"])
def test_a_loss_that_is_not_finite_stops_the_run_at_its_step(tmp_path, kind, value):
    """At step 1 nothing was changed yet: the objective is at fault, and nothing diverged."""
    bad = lambda repaired, batch: (next_token(repaired, batch)[0] * jnp.float32(value), {})
    with pytest.raises(ValueError, match=f"loss is {value} at step 1, before .*objective") as error:
        run_fit(tmp_path, kind, objective=bad)
    assert not isinstance(error.value, Diverged)
    rows = [json.loads(line, parse_constant=pytest.fail) for line in text_of(tmp_path).splitlines()]
    assert rows[-1]["step"] == 1 and rows[-1]["loss"] is None
    # The numbers before it are as they would be; the next call meets the same end.
    with pytest.raises(ValueError, match="at step 1"):
        run_fit(tmp_path, kind, objective=bad)


def broken_by_training(repaired, batch):
    """A loss for a LoRA as it begins, with b = 0, alone."""
    changed = jnp.any(repaired.decoder.layers.q.b[...] != 0)
    return next_token(repaired, batch)[0] + jnp.where(changed, jnp.float32(jnp.nan), 0), {}


def test_a_loss_that_ceases_to_be_finite_is_divergence(tmp_path):
    with pytest.raises(Diverged, match=r"loss is (nan|inf) at step [2-9]: .*may help"):
        run_fit(tmp_path, "lora", objective=broken_by_training)
    with pytest.raises(Diverged, match=r"validation loss is nan at step 1: .*may help"):
        run_fit(tmp_path / "at once", "prompt", rate=float("nan"), evaluate_every=1)


def unlearning(repaired, batch, **options):
    """What gets worse with every step, on every machine; a rate that is far too large need not."""
    loss, parts = next_token(repaired, batch, **options)
    return -loss, parts


def test_a_run_that_only_made_it_worse_is_no_success(tmp_path):
    for _ in range(2):  # the second call goes on from a checkpoint, to the same end
        with pytest.raises(Diverged, match="rose from .* at step 12 .*learning-rate may help"):
            run_fit(tmp_path, "lora", objective=unlearning)


@pytest.mark.parametrize(("loss", "perplexity"), [(2.0, np.exp(2.0)), (800.0, np.inf)])
def test_a_large_loss_has_a_perplexity_without_overflow(loss, perplexity):
    assert loop.perplexity_of(loss) == pytest.approx(perplexity)


def test_a_step_is_begun_before_the_numbers_of_the_last_are_read(tmp_path, monkeypatch):
    """What the device would wait for: the order of steps begun and numbers told."""
    order, make = [], loop.make_train_step

    def watched(*args, **options):
        step = make(*args, **options)

        class Watched:
            compiled = staticmethod(step.compiled)

            def __call__(self, *arguments):
                order.append("begun")
                return step(*arguments)

        return Watched()

    monkeypatch.setattr(loop, "make_train_step", watched)

    def progress(number, steps, note):
        if note.startswith("loss"):
            order.append(number)

    run_fit(tmp_path, progress=progress, evaluate_every=12, checkpoint_every=6)
    between = ["begun", "begun", 1, "begun", 2, "begun", 3, "begun", 4, "begun", 5, 6]
    assert order == [*between, *(step if step == "begun" else step + 6 for step in between)]
