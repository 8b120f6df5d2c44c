"""A sweep: as many trials for each, on text that is not reported, and nothing is done twice."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from idp_jax.config import ConfigError, Sweep
from idp_jax.config.files import from_dict
from idp_jax.evaluation.sweep_results import read_sweep
from idp_jax.experiments import run_sweep
from idp_jax.jobs.progress import Progress
from idp_jax.jobs.signals import Interrupted
from tests.helpers import tiny_folder

RECIPES = {
    "prompt": {"method": "prompt", "prompt_length": 2},
    "lora": {"method": "lora", "lora": {"rank": 1, "targets": ["q"]}},
}
RATES = {"prompt": [1e-2, 3e-3], "lora": [1e-3, 1e5]}


@pytest.fixture(autouse=True)
def optax_promotes():
    """optax raises floats to int32 powers."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def write_documents(file, count, seed):
    """Documents of random words, about 60 bytes each."""
    rng = np.random.default_rng(seed)
    words = lambda: " ".join("".join(map(chr, rng.integers(97, 123, 5))) for _ in range(10))
    file.write_text("".join(json.dumps({"text": words()}) + "\n" for _ in range(count)))
    return file


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A model and its texts."""
    folder = tmp_path_factory.mktemp("sources")
    tiny_folder(folder / "model", num_layers=1, max_positions=512)
    for number, (name, count) in enumerate((("train", 40), ("held", 12), ("second", 4))):
        write_documents(folder / f"{name}.jsonl", count, number)
    return folder


def tree(folder, **changes) -> dict:
    """A sweep of seconds, as a file would say it."""
    data = {"train": folder / "train.jsonl", "held_out": folder / "held.jsonl"}
    data |= {"second": folder / "second.jsonl", "sequence_length": 16, "calibration_windows": 2}
    data |= {"choosing_windows": 2, "reported_windows": 3}
    common = {"model": str(folder / "model"), "out": "out", "data": data, "items": 1}
    common |= {"compression": {"group_size": 32}, "compressions": {"four": {"bits": 4}}}
    common |= {"recipes": RECIPES, "learning_rates": RATES, "tasks": "knowledge_arts"}
    common |= {"trial_tokens": 64, "tokens": 64, "batch_size": 2, "evaluate_every": 1}
    return common | {"seeds": [1, 2], "dense_controls": True} | changes


class Stopping(Progress):
    """Interrupts the training in a few of its updates, and counts them."""

    def __init__(self, *stops):
        self.stops, self.count = set(stops), 0

    def bar(self, description, unit=""):
        from contextlib import contextmanager

        @contextmanager
        def updating():
            yield self.update if description.startswith("training") else lambda *rest: None

        return updating()

    def update(self, done, total, note=""):
        self.count += 1
        if self.count in self.stops:
            raise Interrupted("stopped")


def without_times(found) -> dict:
    """What must not depend on when a sweep was stopped."""
    kept = dataclasses.asdict(found)
    for row in kept["recipes"]:
        del row["seconds"]
    return kept


def test_a_sweep_that_is_stopped_ends_with_the_same_file(sources, tmp_path, monkeypatch):
    (tmp_path / "whole").mkdir()
    (tmp_path / "stopped").mkdir()
    monkeypatch.chdir(tmp_path / "whole")
    said = []
    settings = from_dict(Sweep, tree(sources))
    whole = run_sweep(settings, say=said.append)
    check_whole(settings, whole, said)
    monkeypatch.chdir(tmp_path / "stopped")
    for stops in ((2,), (11,), (23,), ()):  # of the first call, of the second, ...
        progress = Stopping(*stops)
        if stops:
            with pytest.raises(Interrupted):
                run_sweep(settings, progress=progress)
        else:
            again = run_sweep(settings, progress=progress)
    assert without_times(again) == without_times(whole)
    check_going_on(sources, again, monkeypatch)


def check_whole(settings, found, said):
    """Every training took place once, in its folder, and its numbers are in the file."""
    assert read_sweep(settings.out / "sweep.json") == found
    assert said[0].startswith("10 trainings, ") and "[1/10] prompt on four, rate 0.003" in said
    assert [row.recipe for row in found.recipes] == [
        "prompt",
        "lora",
    ] and found.reference == "prompt"
    for row in found.recipes:
        assert [trial.learning_rate for trial in row.trials] == sorted(RATES[row.recipe])
        best = min(row.trials, key=lambda trial: trial.loss)
        assert row.chosen == best.learning_rate and row.edge  # of two, either is an end
        assert row.seeds == [1, 2] and len(row.shares) == 2 and row.tokens == 64
        assert row.seconds > 0 and row.control and set(row.accuracy) == {"knowledge_arts"}
        assert row.share.value == pytest.approx(np.mean(row.shares))
        assert row.share_windows.value == pytest.approx(row.share.value)
    prompt, lora = found.recipes
    assert prompt.against is None and lora.against.value == pytest.approx(
        lora.share.value - prompt.share.value
    )
    assert prompt.parameters == 2 * 64
    bars = [row.name for row in found.baselines]
    assert bars == ["dense", "four"] and found.baselines[0].second_perplexity > 1
    names = [row.name for row in found.variants if "second" not in row.name]
    assert names[0] == "dense" and "four + lora, seed-2" in names
    assert (settings.out / "trials/four/lora/lr-0.001/adapter").is_dir()
    assert (settings.out / "sweep.png").stat().st_size > 1000
    assert "| lora | 0.001* |" in (settings.out / "sweep.md").read_text()


def check_going_on(sources, found, monkeypatch):
    """What is done is not done again, and another recipe may join."""
    with monkeypatch.context() as patched:
        again = lambda *args, **options: pytest.fail("what is done was done again")
        patched.setattr("idp_jax.training.run.formats.load_model", again)
        patched.setattr("idp_jax.experiments.once.compress", again)
        assert without_times(run_sweep(from_dict(Sweep, tree(sources)))) == without_times(found)
    more = {**RECIPES, "prefix": {"method": "prefix", "prompt_length": 1}}
    rates = {**RATES, "prefix": [1e-3, 1e-2]}
    grown = run_sweep(from_dict(Sweep, tree(sources, recipes=more, learning_rates=rates)))
    assert grown.recipes[:2] == found.recipes and grown.recipes[2].recipe == "prefix"
    with pytest.raises(ConfigError, match="holds a run with trial_tokens = 64"):
        run_sweep(from_dict(Sweep, tree(sources, trial_tokens=32)))
