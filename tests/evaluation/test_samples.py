"""Samples of the harness: what it writes itself is read, and what is none is refused in a line."""

import json
import math
from pathlib import Path

import pytest

from idp_jax.config import ConfigError
from idp_jax.evaluation.comparison import compare
from idp_jax.evaluation.samples import item_scores, read_runs, read_samples
from tests.harness_runs import ITEMS, harness_run, rows

GOLDEN = Path(__file__).parents[1] / "golden" / "harness_0.5"
TASKS = ["toy", "toy_answers", "toy_text"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs of the installed harness, in its own layout."""
    folder = tmp_path_factory.mktemp("harness")
    for seed in (1, 2):
        harness_run(folder / f"run_{seed}", seed)
    return folder


def samples(folder: Path, task: str) -> Path:
    """The harness's file of a task."""
    return next(folder.rglob(f"samples_{task}_2*.jsonl"))


@pytest.mark.parametrize("version", ["installed", "0.5"])
def test_what_the_harness_writes_is_read(runs, version):
    folder = runs if version == "installed" else GOLDEN
    for name in ("run_1", "run_2"):
        found = read_samples(folder / name)
        assert list(found.tasks) == TASKS
        toy = found.tasks["toy"]
        assert toy.items == ITEMS == len(toy.documents) == len(toy.samples["acc"])
        about = json.loads(next((folder / name).rglob("results_*.json")).read_text())
        assert toy.metrics["acc"] == pytest.approx(about["results"]["toy"]["acc,none"])
        assert (toy.version, toy.num_fewshot) == (1.0, 0) and toy.chance == 0.25
        assert toy.labels["relation"] == [row["relation"] for row in rows()]
        answers = found.tasks["toy_answers"]
        assert set(answers.samples) == {"exact_match", "exact_match,loose"}
        assert answers.chance is None and found.tasks["toy_text"].chance is None
        assert set(found.tasks["toy_text"].samples) == {"bits_per_byte"}


def test_versions_of_the_harness_agree_on_the_items(runs):
    old, new = (read_samples(folder / "run_1") for folder in (runs, GOLDEN))
    for task in TASKS:
        assert old.tasks[task].documents == new.tasks[task].documents
        # A text without a question is one's prompt and the other's answer.
        same = old.tasks[task].questions == new.tasks[task].questions
        assert same == (task != "toy_text")
    assert compare(runs / "run_1", GOLDEN / "run_2").tests["toy"].same_prompts


def test_one_file_is_a_run(runs):
    (found,) = read_runs(str(samples(runs / "run_1", "toy")))
    assert list(found.tasks) == ["toy"] and found.tasks["toy"].version == 1.0


def test_a_limit_leaves_items_out_and_is_named(runs, tmp_path):
    harness_run(tmp_path / "few", 3, limit=30, names=("toy",))
    whole = samples(runs / "run_1", "toy")
    with pytest.raises(ConfigError, match=r"documents of toy differ, 10 of 40 are in .* alone"):
        compare(whole, tmp_path / "few")


def written(path: Path, *lines: str) -> Path:
    """A file of samples with these lines."""
    path.write_text("\n".join(lines) + "\n")
    return path


def test_what_is_no_sample_is_refused(runs, tmp_path):
    lines = samples(runs / "run_1", "toy").read_text().splitlines()
    row = json.loads(lines[0])
    changed = lambda **values: json.dumps({**row, **values})
    without = lambda key: json.dumps({name: x for name, x in row.items() if name != key})
    bad = {
        r"2 items are doubled \(the first is item 1\)": [*lines, lines[1], lines[2], lines[2]],
        r":2 is not JSON": [lines[0], "{"],
        r":1 is no JSON object": ["[]"],
        r":1 lacks 'doc_hash'; give samples": [without("doc_hash")],
        r":1 lacks 'acc_norm'": [without("acc_norm")],
        r":1: doc_id is 'x'": [changed(doc_id="x")],
        r"acc of an item is not finite": [changed(acc=math.nan), lines[1]],
        r"holds no items": [""],
    }
    for message, content in bad.items():
        file = written(tmp_path / "samples_toy_2026-01-01T00-00-00.0.jsonl", *content)
        with pytest.raises(ConfigError, match=message) as error:
            read_samples(file)
        assert "\n" not in str(error.value) and file.name in str(error.value)


def test_folders_that_hold_no_run_are_refused(runs, tmp_path):
    with pytest.raises(ConfigError, match="holds no samples"):
        read_samples(tmp_path)
    content = samples(runs / "run_1", "toy").read_text()
    for day in (1, 2):
        (tmp_path / f"samples_toy_2026-01-0{day}T00-00-00.0.jsonl").write_text(content)
    with pytest.raises(ConfigError, match="two files of task toy; name one"):
        read_samples(tmp_path)
    for name in ("a", "b"):
        (tmp_path / "both" / name).mkdir(parents=True)
        (tmp_path / "both" / name / "samples_toy.jsonl").write_text(content)
    with pytest.raises(ConfigError, match=r"runs of several models \(a, b\); name one"):
        read_samples(tmp_path / "both")


def test_metrics_that_some_items_lack_are_left_out():
    row = lambda **metrics: {"filter": "none", "metrics": list(metrics), **metrics}
    found = item_scores([row(acc="True", f1=0.5, words=[1, 2]), row(acc="False", words=[1, 2])])
    assert found == {"acc": [1.0, 0.0]}
    assert item_scores([row(bits_per_byte=[-math.log(2) * 6, 3])]) == {"bits_per_byte": [2.0]}
