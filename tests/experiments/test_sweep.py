"""A sweep: as many trials for each, on text that is not reported, and nothing is done twice."""

import dataclasses
import json
import math
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from idp_jax.config import ConfigError, Corpora, Sweep
from idp_jax.config.files import from_dict
from idp_jax.data.text import read_documents
from idp_jax.evaluation.sweep_results import read_sweep
from idp_jax.experiments import run_sweep, sweep
from idp_jax.experiments.held_out import held_out_files, write_held_out
from idp_jax.experiments.sweep_trainings import Trainings, plan
from idp_jax.jobs.progress import SILENT, Progress
from idp_jax.jobs.signals import Interrupted
from idp_jax.training import Diverged
from tests.helpers import tiny_folder, tiny_tokenizer

RECIPES = {
    "prompt": {"method": "prompt", "prompt_length": 2},
    "lora": {"method": "lora", "lora": {"rank": 1, "targets": ["q"]}},
}
RATES = {"prompt": [1e-2, 3e-3], "lora": [1e-3, 1e-2]}


pytestmark = pytest.mark.usefixtures("optax_promotes")


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
    data = {"train": str(folder / "train.jsonl"), "held_out": folder / "held.jsonl"}
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
        @contextmanager
        def updating():
            yield self.update if description.startswith("training") else lambda *rest: None

        return updating()

    def update(self, done, total, note=""):
        self.count += 1
        if self.count in self.stops:
            raise Interrupted(15)


def without_times(found) -> dict:
    """What must not depend on when a sweep was stopped."""
    kept = dataclasses.asdict(found)
    for row in kept["recipes"]:
        del row["seconds"]
    return kept


@pytest.mark.slow
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
    dense, bare = found.baselines
    lost = math.log(bare.perplexity / dense.perplexity)  # of a random model, perhaps nothing
    for row in found.recipes:
        assert [trial.learning_rate for trial in row.trials] == sorted(RATES[row.recipe])
        best = min(row.trials, key=lambda trial: trial.loss)
        assert row.chosen == best.learning_rate and row.edge  # of two, either is an end
        assert row.seeds == [1, 2] and row.tokens == 64 and row.seconds > 0
        assert row.control and set(row.accuracy) == {"knowledge_arts"}
        assert len(row.shares) == (2 if lost > 0 else 0)
        if lost > 0:
            share = math.log(bare.perplexity / row.perplexity) / lost
            assert row.share.value == pytest.approx(share)
            assert row.share_windows.value == pytest.approx(share)
    prompt, lora = found.recipes
    assert prompt.against is None and (lora.against is not None) == (lost > 0)
    assert prompt.parameters == 2 * 64
    bars = [row.name for row in found.baselines]
    assert bars == ["dense", "four"] and found.baselines[0].second_perplexity > 1
    names = [row.name for row in found.variants if "second" not in row.name]
    assert names[0] == "dense" and "four + lora, seed-2" in names
    assert (settings.out / "trials/four/lora/lr-0.001/adapter").is_dir()
    assert (settings.out / "sweep.png").stat().st_size > 1000
    assert f"| lora | {lora.chosen:g}* |" in (settings.out / "sweep.md").read_text()


def check_going_on(sources, found, monkeypatch):
    """What is done is not done again, and another recipe may join."""
    with monkeypatch.context() as patched:
        again = lambda *args, **options: pytest.fail("what is done was done again")
        patched.setattr("idp_jax.training.run.formats.load_model", again)
        patched.setattr("idp_jax.experiments.once.compress", again)
        assert without_times(run_sweep(from_dict(Sweep, tree(sources)))) == without_times(found)
    more = {**RECIPES, "prefix": {"method": "prefix", "prompt_length": 1}}
    rates = {**RATES, "prefix": [1e-3, 1e-2]}
    grown = {"recipes": more, "learning_rates": rates, "cache_teacher": True}
    grown = run_sweep(from_dict(Sweep, tree(sources, **grown)))
    assert grown.recipes[:2] == found.recipes and grown.recipes[2].recipe == "prefix"
    with pytest.raises(ConfigError, match="holds a run with trial_tokens = 64"):
        run_sweep(from_dict(Sweep, tree(sources, trial_tokens=32)))


def test_what_chooses_is_not_reported_and_neither_is_trained_on(tmp_path):
    """By their words: a copy under another spacing is the same document."""
    train = write_documents(tmp_path / "train.jsonl", 5, 0)
    held = write_documents(tmp_path / "held.jsonl", 8, 1)
    copies = [json.loads(line)["text"] for line in train.read_text().splitlines()]
    rows = [json.loads(line)["text"] for line in held.read_text().splitlines()]
    mixed = [copies[0].replace(" ", "  "), *rows, rows[0], copies[3]]
    held.write_text("".join(json.dumps({"text": text}) + "\n" for text in mixed))
    data = Corpora(str(train), held, None, 16, choosing_windows=6, reported_windows=9)
    write_held_out(data, tiny_tokenizer(), tmp_path / "out")
    parts = {
        part: list(read_documents(file)) for part, file in held_out_files(tmp_path / "out").items()
    }
    chosen, reported = set(parts["choosing"]), set(parts["reported"])
    assert chosen and reported and not chosen & reported
    assert chosen | reported <= set(rows) and not (chosen | reported) & set(copies)
    assert sum(map(len, parts["reported"])) >= 9 * 16  # a byte is a token here
    assert sum(map(len, parts["choosing"])) >= 6 * 16
    file = held_out_files(tmp_path / "out")["choosing"]
    file.write_text(file.read_text() + " ")
    with pytest.raises(ConfigError, match="is not as this experiment wrote it"):
        write_held_out(data, tiny_tokenizer(), tmp_path / "out")


def test_too_little_text_and_second_text_of_the_first_are_refused(tmp_path):
    train = write_documents(tmp_path / "train.jsonl", 5, 0)
    held = write_documents(tmp_path / "held.jsonl", 8, 1)
    few = Corpora(str(train), held, None, 16, choosing_windows=60, reported_windows=2)
    with pytest.raises(ConfigError, match="tokens for the choosing windows; give more text"):
        write_held_out(few, tiny_tokenizer(), tmp_path / "out")
    same = Corpora(str(train), held, train, 16, choosing_windows=2, reported_windows=2)
    with pytest.raises(ConfigError, match=r"--data.second \S+ has a document of"):
        write_held_out(same, tiny_tokenizer(), tmp_path / "other")


BAD = {
    "unequal": ({"learning_rates": {"prompt": [0.1, 0.2, 0.3], "lora": [0.1, 0.2]}}, "as many"),
    "factors": ({"learning_rates": {"prompt": [0.1, 0.2]}}, "prompt is tried at 2, lora at 3"),
    "twice": ({"learning_rates": {"prompt": [0.1, 0.1], "lora": [1, 2]}}, "different numbers"),
    "stranger": ({"learning_rates": {"prefix": [0.1, 0.2]}}, "no recipe 'prefix'; there are"),
    "reference": ({"reference": "best"}, "no recipe 'best'; there are prompt, lora"),
    "budget": ({"recipes": {"a": {"tokens": 5}}, "learning_rates": {}}, "tokens is the same for"),
    "calibration": ({"compressions": {"a": {"calibration": "x"}}}, "a: calibration is the same fo"),
    "place": ({"compressions": {"a": {"out": "elsewhere"}}}, "compressions.a: out is the same for"),
    "list": ({"recipes": {"a": {"optimizer": [1]}}, "learning_rates": {}}, "recipes.a: optimizer"),
    "word": ({"recipes": {"a": {"method": ["x"]}}, "learning_rates": {}}, "recipes.a: .*method"),
    "teacher": ({"recipes": {"a": {"teacher": "x"}}, "learning_rates": {}}, "recipes.a: teacher"),
    "rate": (
        {"recipes": {"a": {"optimizer": {"learning_rate": "abc"}}}, "learning_rates": {}},
        r"recipes.a: optimizer.learning_rate: .*\(got 'abc'\)",
    ),
    "seed": ({"seeds": [1, 2**32]}, "must be different numbers between 0 and 4294967295"),
    "group": ({"compressions": {"four": {"group_size": 48}}}, "48"),
    "name": ({"recipes": {"a/b": {}}, "learning_rates": {}}, "'a/b' cannot name a folder"),
    "dense": ({"compressions": {"dense": {}}}, "'dense' is the uncompressed model"),
    "seeds": ({"seeds": [1, 1]}, "must be different numbers"),
    "setting": ({"recipes": {**RECIPES, "lora": {"rank": 2}}}, "recipes.lora: unknown key 'rank'"),
    "compress": ({"compressions": {"four": {"bits": 5}}}, r"compressions.four: --bits 5 is not"),
    "no-text": ({"model": "no/such/folder"}, "no/such/folder"),
    "task": ({"tasks": "knowlege"}, "there is no task 'knowlege'"),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
def test_what_cannot_be_compared_is_said_before_anything_is_done(
    sources, tmp_path, monkeypatch, changes, message
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        run_sweep(from_dict(Sweep, tree(sources, **changes)))
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


BAD_TEXT = {
    "same": ({"held_out": "train.jsonl"}, r"--data.held-out \S+ is --data.train too"),
    "second": ({"second": "held.jsonl"}, r"--data.second \S+ is --data.held-out too"),
    "self": ({"train": "self"}, "--data.train self is no text"),
    "held-out": ({"reported_windows": 10**6}, "too few documents"),
    "calibration": ({"calibration_windows": 10**6}, "windows of 16 tokens asked for"),
}


@pytest.mark.parametrize("plan", [True, False])
@pytest.mark.parametrize(("changes", "message"), BAD_TEXT.values(), ids=BAD_TEXT)
def test_text_that_cannot_be_used_is_refused_by_a_plan_too(
    sources, tmp_path, monkeypatch, changes, message, plan
):
    monkeypatch.chdir(tmp_path)
    settings = tree(sources, plan=plan)
    for name, value in changes.items():
        file = isinstance(value, str) and value != "self"
        settings["data"][name] = str(sources / value) if file else value
    with pytest.raises(ValueError, match=message) as error:
        run_sweep(from_dict(Sweep, settings))
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_a_plan_is_said_and_nothing_is_written(sources, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = []
    settings = from_dict(Sweep, tree(sources, plan=True))
    assert run_sweep(settings, say=said.append) is None and not list(tmp_path.iterdir())
    assert said == [plan(settings).line] and plan(settings).trainings == 10
    assert plan(settings).tokens == 10 * 64
    pool = {"pool": {"method": "idp", "pool_lengths": [2, 2]}}
    one = from_dict(Sweep, tree(sources, recipes=pool, learning_rates={}, dense_controls=False))
    assert plan(one).tokens == 2 * (3 + 2) * 64  # each prompt has the whole budget


def test_lengths_by_damage_are_for_compressed_models(sources, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipes = {"deep": {"method": "prefix", "prompt_length": 2, "prefix": {"by_damage": True}}}
    asked = tree(sources, recipes=recipes, learning_rates={}, plan=True)
    for controls in (False, True):
        settings = from_dict(Sweep, asked | {"dense_controls": controls})
        if controls:
            with pytest.raises(ConfigError, match="recipes.deep: prefix.by_damage, .*lengths"):
                run_sweep(settings)
        else:
            run_sweep(settings)
    assert not list(tmp_path.iterdir())


def test_a_recipe_without_rates_has_its_own_times_the_factors(sources):
    recipes = {"lora": {"method": "lora"}, "own": {"optimizer": {"learning_rate": "2e-2"}}}
    settings = from_dict(Sweep, tree(sources, recipes=recipes, learning_rates={}))
    assert settings.rates("lora") == (3e-5, 1e-4, 3e-4)
    assert settings.rates("own") == (6e-3, 2e-2, 6e-2)


def test_the_uncompressed_model_teaches_where_a_recipe_asks_for_it(sources, tmp_path):
    recipes = {
        "ce": {},
        "kl": {"objective": "kl + 0.5*ce"},
        "start": {"method": "prefix", "init": {"model": "teacher"}},
        "own": {"objective": "kl", "teacher": {"model": "other", "temperature": 2.0}},
    }
    settings = from_dict(Sweep, tree(sources, recipes=recipes, learning_rates={}))
    made = {name: settings.training(name, 0.1, "m", tmp_path, tokens=4096) for name in recipes}
    teachers = {name: config.teacher.model for name, config in made.items()}
    dense = settings.model
    assert teachers == {"ce": None, "kl": dense, "start": dense, "own": "other"}
    assert made["own"].teacher.temperature == 2.0 and made["ce"].learning_rate == 0.1
    assert all(config.teacher.cache is None for config in made.values())


def test_trainings_share_what_the_uncompressed_model_said(sources, tmp_path):
    recipes = {
        "ce": {},
        "kl": {"objective": "kl + 0.5*ce"},
        "start": {"method": "prefix", "init": {"model": "teacher"}},
        "other": {"objective": "kl", "teacher": {"model": "other"}},
        "short": {"objective": "kl", "teacher": {"form": "topk"}},
        "own": {"objective": "kl", "teacher": {"cache": "own"}},
    }
    settings = from_dict(Sweep, tree(sources, recipes=recipes, learning_rates={}))
    settings = dataclasses.replace(settings, cache_teacher=True)
    made = {name: settings.training(name, 0.1, "m", tmp_path, tokens=4096) for name in recipes}
    caches = {name: config.teacher.cache for name, config in made.items()}
    none = dict.fromkeys(("ce", "start", "other", "short"))
    assert caches == none | {"kl": settings.out / "teacher" / "default", "own": Path("own")}


def test_a_training_that_diverges_counts_as_a_trial(sources, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = from_dict(Sweep, tree(sources))
    given = {"tokens": 4096, "data": {"train": str(sources / "train.jsonl")}}
    config = settings.training("prompt", 0.1, settings.model, tmp_path / "lr-0.1", **given)
    calls, said = [], []

    def diverge(config, **options):
        calls.append(config)
        raise Diverged("the loss is nan at step 3: training diverged; a lower rate may help")

    monkeypatch.setattr("idp_jax.training.train", diverge)
    found = Trainings(settings, SILENT, said.append).train(config, "one")
    assert found.result is None and found.trial.loss == math.inf and found.seconds > 0
    assert "training diverged" in said[-1]
    again = Trainings(settings, SILENT, said.append).train(config, "one")
    assert again == found and len(calls) == 1  # it is remembered
    record = tmp_path / "lr-0.1.json"
    note = json.loads(record.read_text())
    record.write_text(json.dumps({**note, "inputs": {**note["inputs"], "model": {}}}))
    Trainings(settings, SILENT, said.append).train(config, "one")
    assert len(calls) == 2  # of the same inputs only
    record.write_text(json.dumps({**note, "seconds": "x"}))
    with pytest.raises(ConfigError, match=r"lr-0.1.json is damaged \(seconds is 'x'\); remove"):
        Trainings(settings, SILENT, said.append).train(config, "one")
    record.unlink()
    for result in ({"best_step": 1}, {"validation_loss": None, "best_step": 1}, {"prompts": []}):
        monkeypatch.setattr("idp_jax.training.train", lambda config, found=result, **more: found)
        with pytest.raises(ConfigError, match=r"lr-0.1/result.json is damaged .*; remove it"):
            Trainings(settings, SILENT, said.append).train(config, "one")
    broken = lambda config, **options: (_ for _ in ()).throw(ValueError("no text"))
    monkeypatch.setattr("idp_jax.training.train", broken)
    other = dataclasses.replace(config, seed=9)
    with pytest.raises(ValueError, match="no text"):
        Trainings(settings, SILENT, said.append).train(other, "two")


def test_what_is_left_is_told_in_hours_once_a_training_was_timed(sources, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings, said = from_dict(Sweep, tree(sources)), []
    result = {"validation_loss": 1.0, "best_step": 2}
    monkeypatch.setattr("idp_jax.training.train", lambda config, **options: result)
    trainings = Trainings(settings, SILENT, said.append)
    for number in range(2):
        out = tmp_path / f"lr-{number}"
        config = settings.training("prompt", 0.1, settings.model, out, tokens=4096)
        assert trainings.train(config, "one").trial.loss == 1.0
    assert said == ["[1/10] one", "[2/10] one (about 0.0 hours left)"]


def test_an_existing_compressed_model_is_taken_as_it_is(sources):
    given = {"mine": {"model": str(sources / "model")}}
    assert sweep.model_of(from_dict(Sweep, tree(sources, compressions=given)), "mine") == str(
        sources / "model"
    )
    both = {"mine": {"model": str(sources / "model"), "bits": 3}}
    with pytest.raises(ConfigError, match="is compressed already; give it alone"):
        sweep.check_sweep(from_dict(Sweep, tree(sources, compressions=both)))
