"""The one call that scores a model: what comes back, offline and without torch."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from idp_jax.evaluation.harness_tasks import evaluate
from idp_jax.recover import Pool, SoftPrompt
from tests.evaluation.test_task_data import ROW, write_rows
from tests.helpers import tiny_decoder, tiny_folder, tiny_tokenizer

WITHOUT_TORCH = """
import json, sys
from importlib.machinery import PathFinder

class WithoutTorch(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name == "torch" else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutTorch
from idp_jax import load_model, load_tokenizer
from idp_jax.evaluation.harness_tasks import evaluate
folder, data = sys.argv[1:]
tasks = ["arc_easy", "triviaqa", "knowledge_arts"]
found = evaluate(load_model(folder), load_tokenizer(folder), tasks=tasks, task_data=data, limit=2)
assert "torch" not in sys.modules
print(json.dumps(sorted(found.tasks)))
"""


@pytest.fixture
def data(tmp_path):
    write_rows(tmp_path / "arc_easy" / "test.jsonl", 5)
    write_rows(tmp_path / "arc_easy" / "train.jsonl", 5)
    question = {"question": "Who", "answer": {"aliases": ["Nobody"], "value": "Nobody"}}
    write_rows(tmp_path / "triviaqa" / "validation.jsonl", 3, question)
    return tmp_path


def test_result_holds_what_a_comparison_needs(data):
    model = tiny_decoder("llama", vocab_size=259, max_positions=1024)
    prompts = [SoftPrompt.init(model, n, jax.random.key(n)) for n in (3, 5)]
    found = evaluate(
        Pool(prompts).repair(model),
        tiny_tokenizer(),
        tasks=["arc_easy", "triviaqa", "knowledge"],
        task_data=data,
        limit=3,
        num_fewshot=None,
        batch_size=4,
    )
    row = found.tasks["arc_easy"]
    assert row.items == 3 and row.num_fewshot == 0 and row.version == 1.0
    assert row.metrics["acc"] == sum(row.samples["acc"]) / 3
    low, high = row.interval["acc"]
    assert 0 <= low <= row.metrics["acc"] <= high <= 1
    assert len(set(row.documents)) == 3
    assert set(found.tasks["triviaqa"].samples) == {"exact_match"}
    assert set(found.groups) == {"knowledge"}
    # Three were asked for; the group counts once, however many tasks it has.
    asked = [row.metrics["acc"], found.tasks["triviaqa"].metrics["exact_match"]]
    asked.append(found.groups["knowledge"]["acc"])
    assert found.mean_accuracy == pytest.approx(sum(asked) / 3)
    assert all(sum(row.choices) == row.items for row in found.tasks.values())
    assert found.choices == np.sum([row.choices for row in found.tasks.values()], 0).tolist()


def test_fewshot_examples_are_used(data):
    model = tiny_decoder("llama", vocab_size=259)
    run = lambda shots: evaluate(
        model,
        tiny_tokenizer(),
        tasks=["arc_easy"],
        task_data=data,
        limit=2,
        num_fewshot=shots,
        max_length=200,
    )
    assert run(2).tasks["arc_easy"].num_fewshot == 2
    assert run(0).tasks["arc_easy"].choices is None


@pytest.mark.slow
def test_runs_without_torch(data, tmp_path):
    folder = tiny_folder(tmp_path / "model", "llama", max_positions=1024)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, str(folder), str(data)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == ["arc_easy", "knowledge_arts", "triviaqa"]


def test_row_of_the_fixture_has_an_answer():
    assert ROW["answerKey"] in ROW["choices"]["label"]


def test_a_library_call_prints_nothing(capfd):
    model = tiny_decoder(vocab_size=259)
    evaluate(model, tiny_tokenizer(), tasks=["knowledge"], limit=1)
    assert capfd.readouterr() == ("", "")
