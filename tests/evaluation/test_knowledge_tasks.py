"""The knowledge probe: its data keeps its promises, and the harness runs it alone, offline."""

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import lm_eval
import pytest
from lm_eval.tasks import TaskManager

TASKS = Path(__file__).parents[2] / "idp_jax" / "evaluation" / "tasks" / "knowledge"
DOMAINS = sorted(path.stem for path in TASKS.glob("*.jsonl"))
# Here every item asks for the same kind of thing, so each choice is right somewhere else.
ONE_KIND_DOMAINS = ["authors", "capitals", "chemical_symbols"]

# Run apart and from another folder, as on a machine where torch cannot be found. (With
# sys.modules["torch"] = None instead, datasets takes torch for imported and fails.)
EVALUATE_WITHOUT_TORCH = """
import json, sys
from importlib.machinery import PathFinder

class WithoutTorch(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name == "torch" else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutTorch
import lm_eval
from lm_eval.tasks import TaskManager
manager = TaskManager(include_path=sys.argv[1], include_defaults=False)
output = lm_eval.simple_evaluate(
    model="dummy", tasks=["knowledge"], task_manager=manager, limit=2, bootstrap_iters=0
)
assert "torch" not in sys.modules
print(json.dumps(output["results"]["knowledge"]))
"""


def read_domain(domain: str) -> list[dict]:
    lines = (TASKS / f"{domain}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def gold(item: dict) -> str:
    return item["choices"][item["answer"]]


@pytest.fixture(scope="module")
def manager() -> TaskManager:
    return TaskManager(include_path=TASKS, include_defaults=False)


def test_group_holds_every_domain(manager):
    loaded = manager.load("knowledge")
    assert sorted(loaded["tasks"]) == [f"knowledge_{domain}" for domain in DOMAINS]
    assert len(DOMAINS) >= 8
    for name, task in loaded["tasks"].items():
        assert list(task.test_docs()) == read_domain(name.removeprefix("knowledge_"))


def test_names_are_free_in_the_harness(manager):
    assert not set(manager.all_tasks) & set(TaskManager().all_tasks)


@pytest.mark.parametrize("domain", DOMAINS)
def test_items_are_well_formed(domain):
    items = read_domain(domain)
    assert len(items) >= 50
    assert len({item["id"] for item in items}) == len(items)
    for item in items:
        assert set(item) == {"id", "context", "choices", "answer"}
        assert len(item["choices"]) == len({choice.casefold() for choice in item["choices"]}) == 4
        assert item["answer"] in range(4)
        assert 6 <= len(item["context"].split()) <= 16
        assert all(1 <= len(choice.split()) <= 3 for choice in item["choices"])
        text = [item["context"], *item["choices"]]
        assert all(part == " ".join(part.split()) for part in text)


def test_no_context_is_asked_twice():
    contexts = Counter(item["context"].casefold() for d in DOMAINS for item in read_domain(d))
    assert [context for context, count in contexts.items() if count > 1] == []


def test_place_of_the_answer_says_nothing():
    places = Counter(item["answer"] for domain in DOMAINS for item in read_domain(domain))
    for place in range(4):
        assert 0.15 <= places[place] / places.total() <= 0.35


@pytest.mark.parametrize("domain", DOMAINS)
def test_form_of_a_choice_says_nothing(domain):
    """No choice stands out by its capitals, its digits, its article, or as part of the context."""
    for item in read_domain(domain):
        choices, context = item["choices"], item["context"]
        assert not re.search(rf"\b{re.escape(gold(item))}\b", context, re.IGNORECASE), item
        assert len({choice[0].isupper() for choice in choices}) == 1, item
        assert len({choice.isdigit() for choice in choices}) == 1, item
        if context.endswith((" a", " an")):
            vowels = {choice[0] in "aeiou" for choice in choices}
            assert vowels == {context.endswith(" an")}, item


@pytest.mark.parametrize("domain", ONE_KIND_DOMAINS)
def test_distractors_are_answers_of_other_items(domain):
    items = read_domain(domain)
    answers = {gold(item) for item in items}
    assert len(answers) == len(items)
    assert {choice for item in items for choice in item["choices"]} == answers


def test_requests_join_context_and_choice_by_one_space(manager):
    task = manager.load("knowledge_capitals")["tasks"]["knowledge_capitals"]
    task.build_all_requests(limit=1)
    first = read_domain("capitals")[0]
    expected = [(first["context"], f" {choice}") for choice in first["choices"]]
    assert [instance.args for instance in task.instances] == expected


def test_harness_scores_the_group(manager):
    output = lm_eval.simple_evaluate(
        model="dummy", tasks=["knowledge"], task_manager=manager, bootstrap_iters=0
    )
    results = output["results"]
    assert set(results) == {"knowledge", *(f"knowledge_{domain}" for domain in DOMAINS)}
    sizes = {domain: output["n-samples"][f"knowledge_{domain}"]["effective"] for domain in DOMAINS}
    assert sizes == {domain: len(read_domain(domain)) for domain in DOMAINS}
    for metric in ("acc,none", "acc_norm,none"):
        right = sum(results[f"knowledge_{domain}"][metric] * sizes[domain] for domain in DOMAINS)
        assert results["knowledge"][metric] == pytest.approx(right / sum(sizes.values()))
    assert 0.1 < results["knowledge"]["acc,none"] < 0.45  # random scores, four choices


def test_runs_without_torch_from_any_folder(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", EVALUATE_WITHOUT_TORCH, str(TASKS)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "acc,none" in json.loads(done.stdout.splitlines()[-1])


def test_unknown_domain_is_refused(manager):
    cooking = {"task": "knowledge_capitals", "dataset_kwargs": {"domain": "cooking"}}
    with pytest.raises(ValueError, match="unknown knowledge domain 'cooking': choose one of arts"):
        manager.load({"group": "kitchen", "task": [cooking]})
