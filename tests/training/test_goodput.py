"""Where a training's time goes, and a trace of it."""

import time

import jax
import numpy as np
import pytest

from idp_jax.commands.train import _spent
from idp_jax.config import Optimizer
from idp_jax.data.stream import TrainingText
from idp_jax.jobs import signals
from idp_jax.recover import SoftPrompt
from idp_jax.training import fit, next_token
from idp_jax.training.goodput import Goodput
from idp_jax.training.profile import Profile
from idp_jax.training.step import TrainState, make_optimizer, make_train_step
from tests.helpers import tiny_decoder

LENGTH = 16
pytestmark = pytest.mark.usefixtures("optax_promotes")


class Numbers:
    """A sink that keeps what it is told."""

    def __init__(self):
        self.told = []

    def write(self, step, values):
        self.told.append((step, values))

    def drop_after(self, step): ...

    def close(self): ...


class Late:
    """Batches that take their time."""

    def __init__(self, batches, seconds):
        self._batches, self._seconds = batches, seconds

    def __next__(self):
        time.sleep(self._seconds)
        return next(self._batches)

    def state(self):
        return self._batches.state()


def run_fit(steps=6, seconds=0.0, **rest):
    windows = np.random.default_rng(1).integers(0, 90, (24, LENGTH)).astype(np.int32)
    text = TrainingText("", None, LENGTH, windows[-4:], windows[:-4], 0, 0)
    model, sink = tiny_decoder("llama", num_layers=1), Numbers()
    fit(
        SoftPrompt.init(model, 2, jax.random.key(5)),
        model,
        next_token,
        make_optimizer(Optimizer(), 0.05, steps),
        Late(text.batches(2), seconds),
        text.validation_batches(2),
        steps=steps,
        evaluate_every=3,
        sinks=[sink],
        **rest,
    )
    return sink.told


def test_seconds_are_counted_by_what_they_went_to():
    goodput, began = Goodput(), time.perf_counter()
    told = run_fit(seconds=0.2, goodput=goodput, fastest=1e6)
    whole = time.perf_counter() - began
    found = goodput.summary(1e6)
    seconds = found["seconds"]
    assert seconds["input"] >= 6 * 0.2 - 0.1  # no step of this model takes a fifth of a second
    assert {"compiling", "validation", "steps"} <= seconds.keys()
    assert seconds["all"] == pytest.approx(whole, rel=0.1)
    assert sum(seconds.values()) - seconds["all"] <= seconds["all"] + 0.01
    assert found["goodput"] == pytest.approx(seconds["steps"] / seconds["all"], abs=0.01)
    assert goodput.tokens == 6 * 2 * LENGTH
    assert found["mfu"] == pytest.approx(goodput.tokens / goodput.seconds["steps"] / 1e6)
    steps = [values for _, values in told if "loss" in values]
    assert all(values["mfu"] == values["tokens_per_second"] / 1e6 for values in steps)


def test_a_device_without_a_known_peak_has_no_mfu():
    goodput = Goodput()
    assert not any("mfu" in values for _, values in run_fit(2, goodput=goodput))
    assert "mfu" not in goodput.summary(None)


def test_a_trace_of_the_steps_behind_the_first(tmp_path):
    said = []
    run_fit(profile=Profile(tmp_path / "profile", 2, said.append))
    (line,) = said
    assert line.startswith(f"the trace of steps 3 to 4 is in {tmp_path / 'profile'}: ")
    assert len(list(tmp_path.rglob("*.trace.json.gz"))) == 1


@pytest.mark.parametrize(("steps", "line"), [(3, "the trace of steps 3 to 3 "), (2, "nothing was")])
def test_a_run_shorter_than_its_trace(tmp_path, steps, line):
    said = []
    run_fit(steps, profile=Profile(tmp_path, 9, said.append))
    assert [text[: len(line)] for text in said] == [line]


def test_the_parts_of_a_step_have_names():
    model, optimizer = tiny_decoder("llama", num_layers=1), make_optimizer(Optimizer(), 0.1, 2)
    state = TrainState.start(SoftPrompt.init(model, 2, jax.random.key(5)), optimizer)
    windows = np.zeros((2, LENGTH), np.int32)
    batch = TrainingText("", None, LENGTH, windows, windows, 0, 0).first(2)
    text = make_train_step(optimizer, next_token).compiled(state, model, batch).as_text()
    for part in ("attention", "mlp", "head", "loss", "optimizer", "embed"):
        assert f"/{part}/" in text or f"({part})/" in text, part


def test_a_signal_waits_for_the_trace(tmp_path, monkeypatch):
    profile, held = Profile(tmp_path, 1), []
    with signals.handled():
        watch = signals._watch
        assert watch is not None
        monkeypatch.setattr(jax.profiler, "start_trace", lambda *folder, **options: None)
        monkeypatch.setattr(jax.profiler, "stop_trace", lambda: held.append(watch.holds))
        profile.start(3)
        profile.stop(3)
    assert held == [1]


def test_a_call_of_no_time_says_no_more_than_its_goodput():
    time = {"goodput": 0.5, "seconds": {"steps": 0.2, "all": 0.4}}
    assert _spent(time) == "goodput 50% of 0:00:00 in steps"
    time["seconds"] = {"steps": 2, "saving": 1, "all": 4}
    assert _spent(time) == "goodput 50% of 0:00:04 in steps: 0:00:02 steps, 0:00:01 saving"
