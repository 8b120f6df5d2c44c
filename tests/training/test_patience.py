"""Where a training ends: by patience, by its budget, or before its first step; best and last."""

import json
import signal
from contextlib import closing
from dataclasses import replace
from functools import cache

import jax
import numpy as np
import pytest

from idp_jax.config import ConfigError, Data, Optimizer, Train
from idp_jax.data.stream import TrainingText
from idp_jax.jobs.files import contents
from idp_jax.jobs.signals import Interrupted
from idp_jax.recover import SoftPrompt
from idp_jax.training import Checkpointer, JsonLines, fit, loop, next_token, train
from idp_jax.training.step import make_optimizer, make_schedule, make_train_step
from tests.helpers import tiny_decoder

LENGTH, STEPS = 16, 20
optimizer_of, schedule_of, model = (
    cache(make_optimizer),
    cache(make_schedule),
    cache(lambda: tiny_decoder("llama", num_layers=1)),
)


@pytest.fixture(scope="module", autouse=True)
def as_a_run_is():
    """optax raises floats to int32 powers; runs of equal settings share their compiled step."""
    with jax.numpy_dtype_promotion("standard"), pytest.MonkeyPatch.context() as patch:
        shared = cache(make_train_step)  # no randomness in these trainings: the key is left out
        patch.setattr(
            loop, "make_train_step", lambda *parts, key=None, **rest: shared(*parts, **rest)
        )
        yield


def run_fit(folder, *, steps=STEPS, patience=2, rate=0.2, **rest):
    """A training whose rate is so high that it soon gets no better."""
    rng = np.random.default_rng(1)
    windows = rng.choice([7, 30, 55, 81], (24, LENGTH)).astype(np.int32)
    # Other words than are trained on, so that training soon makes it worse.
    other = rng.choice([11, 40, 62, 90], (4, LENGTH)).astype(np.int32)
    text = TrainingText("", None, LENGTH, np.concatenate([other[:3], windows[-1:]]), windows, 0, 0)
    settings, lasts = Optimizer(schedule="constant"), []
    with (
        closing(JsonLines(folder / "metrics.jsonl")) as metrics,
        Checkpointer(folder / "checkpoints") as checkpointer,
    ):
        adapter, summary = fit(
            SoftPrompt.init(model(), 2, jax.random.key(5)),
            model(),
            next_token,
            optimizer_of(settings, rate, STEPS),
            text.batches(2),
            text.validation_batches(2),
            steps=steps,
            evaluate_every=2,
            checkpoint_every=3,
            patience=patience,
            sinks=[metrics],
            checkpointer=checkpointer,
            schedule=schedule_of(settings, rate, STEPS),
            keep_last=lasts.append,
            **rest,
        )
    return adapter, lasts[0], summary


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def same(first, second) -> bool:
    pairs = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    return all((np.asarray(x) == np.asarray(y)).all() for x, y in pairs)


def test_it_stops_after_as_many_validations_without_a_better_one(tmp_path):
    best, last, summary = run_fit(tmp_path / "stopped")
    losses = {row["step"]: row["validation_loss"] for row in rows(tmp_path / "stopped")
              if "validation_loss" in row}  # fmt: skip
    assert summary["stopped_early"] and summary["last_step"] == max(losses) < STEPS
    assert summary["best_step"] == min(losses, key=losses.__getitem__)
    assert summary["last_step"] == summary["best_step"] + 2 * 2  # two validations, every 2 steps
    assert not same(best, last)
    # Until there it is the run that does not stop.
    run_fit(tmp_path / "whole", patience=None)
    stopped = (tmp_path / "stopped" / "metrics.jsonl").read_text()
    assert (tmp_path / "whole" / "metrics.jsonl").read_text().startswith(stopped)


def test_interrupted_anywhere_it_stops_at_the_same_step(tmp_path):
    whole = run_fit(tmp_path / "whole")
    folder, end = tmp_path / "other", whole[2]["last_step"]
    moments = [(3, "loss"), (4, "validation"), (end - 1, "loss"), (end, "validation")]
    for moment in dict.fromkeys(moments):

        def stop(number, steps, note, moment=moment):
            if (number, note.partition(" ")[0]) == moment:
                raise Interrupted(signal.SIGTERM)

        with pytest.raises(Interrupted):
            run_fit(folder, progress=stop)
    for _ in range(2):  # and a finished one finds the same again
        best, last, summary = run_fit(folder)
        assert same(best, whole[0]) and same(last, whole[1]) and summary == whole[2]
    metrics = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "other")]
    assert metrics[0] == metrics[1]


def test_without_steps_the_start_is_kept(tmp_path):
    called = []
    for _ in range(2):
        best, last, summary = run_fit(tmp_path, steps=0, begin=lambda *args: called.append(args))
        start = SoftPrompt.init(model(), 2, jax.random.key(5))
        assert same(best, start) and same(last, start)
        assert (summary["best_step"], summary["last_step"]) == (0, 0)
        assert not summary["stopped_early"] and not called
    assert [row["step"] for row in rows(tmp_path)] == [0]


def test_the_step_that_is_shown_is_the_one_that_runs(tmp_path, monkeypatch):
    """It is compiled once, and before the first validation."""
    programs, order = [], []
    run_fit(
        tmp_path,
        steps=2,
        begin=lambda program, steps: (programs.append((program, steps)), order.append("begin")),
        progress=lambda number, steps, note: order.append(note.partition(" ")[0]),
    )
    assert [steps for _, steps in programs] == [2]
    assert order.index("begin") < order.index("validation")
    assert programs[0][0].memory_analysis().temp_size_in_bytes > 0


def test_every_step_says_its_rate_and_the_clock_has_a_file_of_its_own(tmp_path):
    with closing(JsonLines(tmp_path / "m.jsonl")) as first:
        with closing(JsonLines(tmp_path / "t.jsonl", timings=True)) as second:
            for sink in (first, second):
                sink.write(1, {"loss": 2.0, "tokens_per_second": 5.0})
                sink.write(1, {"validation_loss": 3.0})
    assert (tmp_path / "t.jsonl").read_text() == '{"step": 1, "tokens_per_second": 5.0}\n'
    assert "tokens" not in (tmp_path / "m.jsonl").read_text()
    run_fit(tmp_path / "run", steps=2)
    steps = [row for row in rows(tmp_path / "run") if "loss" in row]
    assert [set(row) for row in steps] == [
        {"step", "loss", "ce", "gradient_norm", "learning_rate"}
    ] * 2
    assert steps[0]["learning_rate"] == np.float32(0.2)


@pytest.mark.parametrize("shape", ["linear", "cosine", "constant"])
def test_schedules(shape):
    steps, rate, warmup = 40, 0.3, 10
    schedule = make_schedule(Optimizer(schedule=shape, warmup=warmup / steps), rate, steps)
    found = np.array([float(schedule(step)) for step in range(steps)])
    step = np.arange(steps, dtype=np.float64)
    share = (step - warmup) / (steps - warmup)
    decay = {"linear": 1 - share, "cosine": (1 + np.cos(np.pi * share)) / 2}
    expected = np.full(steps, rate)
    if shape in decay:
        expected = rate * np.where(step < warmup, (step + 1) / warmup, decay[shape])
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)


def settings(files, out, **changes) -> Train:
    data = Data(train=str(files / "text.txt"), sequence_length=LENGTH, validation_windows=2)
    fields = {"model": str(files / "model"), "out": out, "evaluate_every": 1, "prompt_length": 2}
    return Train(**{**fields, "tokens": STEPS * 2 * LENGTH, "data": data, **changes})


def test_a_run_that_patience_ended_is_complete(files, tmp_path):
    out = tmp_path / "run"
    config = settings(files, out, patience=1, method="lora", optimizer=Optimizer(learning_rate=0.2))
    result, said = train(config, say=(said := []).append), said
    assert result["stopped_early"] and result["last_step"] < STEPS
    assert result["training_tokens"] == result["last_step"] * 2 * LENGTH
    assert set(result["last"]) == set(result["adapter"]) == set(contents(out / "last"))
    assert contents(out / "last") != contents(out / "adapter")
    assert train(config) == result
    with pytest.raises(ConfigError, match=r"evaluate_every = 1.*\(--patience counts validations\)"):
        train(replace(config, evaluate_every=2))
    kept = {name: contents(out / name) for name in ("adapter", "last")}
    for file in sorted((out / "last").iterdir()):
        file.unlink()
    (out / "last").rmdir()
    again = train(config)
    assert {name: contents(out / name) for name in kept} == kept
    assert again["last_step"] == result["last_step"]
    assert any("of memory" in line and "about 0:00:0" in line for line in said)
    (out / "last" / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"adapter_config\.json is not as this run wrote it"):
        train(config)


def test_no_tokens_write_the_start(files, tmp_path):
    out, said = tmp_path / "run", []
    result = train(settings(files, out, tokens=0), say=said.append)
    assert result["training_tokens"] == 0 and result["best_step"] == 0
    assert contents(out / "adapter") == contents(out / "last")
    assert said[0].startswith("the start of prompt of 2 (128 parameters) is kept as it is: no tok")
    assert train(settings(files, out, tokens=0)) == result
    with pytest.raises(ConfigError, match="--tokens 5 is less than one step of 32 tokens"):
        settings(files, out, tokens=5)
