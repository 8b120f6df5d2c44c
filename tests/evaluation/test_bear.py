"""BEAR's facts as rows of the harness's task: every template, and what is wrong named by place."""

import json

import pytest

from idp_jax.evaluation.bear import TEMPLATES, bear_rows
from idp_jax.evaluation.harness_tasks import evaluate
from idp_jax.evaluation.task_data import local_tasks
from tests.datasets import DATA, needs_data
from tests.helpers import tiny_decoder, tiny_tokenizer

RELATIONS = {
    "P1": {
        "templates": ["[X] lies in [Y].", "[Y] is where [X] lies.", "In [Y] there is [X]."],
        "options": ["Asia", "Africa", "Europe"],
        "domains": ["Geographic", "Historical"],
    },
    "P2": {
        "templates": ["[X] eats [Y].", "[Y] feeds [X].", "Food of [X]: [Y]."],
        "options": ["hay", "fish"],
        "domains": ["Scientific"],
    },
}
FACTS = [
    {"relation": "P1", "subject": "Nepal", "subject_aliases": [], "answer": 0},
    {"relation": "P1", "subject": "Malta", "subject_aliases": [], "answer": 2},
    {"relation": "P1", "subject": "[Y] of X", "subject_aliases": [], "answer": 1},
    {"relation": "P2", "subject": "A horse", "subject_aliases": [], "answer": 0},
]


def write_facts(folder, facts=FACTS, relations=RELATIONS):
    folder.mkdir(parents=True, exist_ok=True)
    lines = [fact if isinstance(fact, str) else json.dumps(fact) for fact in facts]
    (folder / "facts.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "relations.json").write_text(json.dumps(relations))
    return folder


def test_rows_are_sentences_and_alternate_over_relations(tmp_path):
    rows = bear_rows(write_facts(tmp_path), 1)
    assert [row["relation"] for row in rows.rows] == ["P1", "P2", "P1", "P1"]
    assert rows.lines == [1, 4, 2, 3]
    assert rows.rows[1] == {
        "relation": "P2",
        "domains": ["Scientific"],
        "subject": "A horse",
        "text_options": ["hay feeds A horse.", "fish feeds A horse."],
        "correct": 0,
    }
    assert rows.rows[3]["text_options"][1] == "Africa is where [Y] of X lies."


def test_templates_are_tasks_as_the_harness_own(tmp_path):
    write_facts(tmp_path / "bear")
    (own,) = local_tasks(["bear"], tmp_path)
    (group,) = local_tasks(["bear_templates"], tmp_path)
    named = {task.task_name: task for task in [own, *group.get_all_tasks()]}
    assert set(named) == set(TEMPLATES)
    asked = ("output_type", "target_delimiter", "doc_to_text", "doc_to_choice", "doc_to_target")
    for name, task in named.items():
        settings = [getattr(task.config, key) for key in asked]
        assert settings == [getattr(own.config, key) for key in asked]
        sentences = bear_rows(tmp_path / "bear", TEMPLATES[name]).rows[0]["text_options"]
        task.set_config(key="num_fewshot", value=0)
        task.build_all_requests(limit=1)
        assert [instance.args for instance in task.instances] == [("", s) for s in sentences]
    with pytest.raises(ValueError, match=r"'bear_template_2' cannot be had \(its sentences are"):
        local_tasks(["bear_template_2"])


def test_rows_in_the_harness_own_fields_are_read_as_such(tmp_path):
    row = {"text_options": ["It is a.", "It is b."], "correct": 1}
    (tmp_path / "bear").mkdir()
    (tmp_path / "bear" / "test.jsonl").write_text(json.dumps(row) + "\n")
    (task,) = local_tasks(["bear"], tmp_path)
    assert task.test_docs()[0] == row


def test_results_hold_relations_and_domains(tmp_path):
    write_facts(tmp_path / "bear")
    model = tiny_decoder("llama", vocab_size=259, num_layers=1)
    found = evaluate(model, tiny_tokenizer(), tasks=["bear"], task_data=tmp_path, batch_size=4)
    task = found.tasks["bear"]
    assert task.labels["relation"] == ["P1", "P2", "P1", "P1"]
    domains = ["; ".join(RELATIONS[name]["domains"]) for name in task.labels["relation"]]
    assert task.labels["domains"] == domains
    right = task.samples["acc"]
    by_relation = task.accuracy_by("relation")
    assert by_relation["P1"].value == pytest.approx((right[0] + right[2] + right[3]) / 3)
    assert by_relation["P2"].value == right[1]
    by_domain = task.accuracy_by("domains")
    assert by_domain["Historical"] == by_relation["P1"] and len(by_domain) == 3


BAD = {
    "no relation": ({**FACTS[1], "relation": "P9"}, "the relation is 'P9'"),
    "no subject": ({**FACTS[1], "subject": " "}, "the subject is ' '"),
    "no answer": ({**FACTS[1], "answer": 3}, "the answer is 3, which is none of the 3 options"),
    "answer below 0": ({**FACTS[1], "answer": -1}, "the answer is -1"),
    "answer true": ({**FACTS[1], "answer": True}, "answer is true or false"),
    "no field": ({"relation": "P1", "answer": 1}, "the subject is None"),
    "no json": ("{", "not JSON"),
}


@pytest.mark.parametrize(("fact", "message"), BAD.values(), ids=BAD)
def test_a_bad_fact_is_named_by_its_line(tmp_path, fact, message):
    write_facts(tmp_path / "bear", [FACTS[0], fact, *FACTS[2:]])
    with pytest.raises(ValueError, match=message) as error:
        local_tasks(["bear_template_3"], tmp_path)
    assert "facts.jsonl:2: " in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("relation", "message"),
    [
        ("x", "has no template 3"),
        ({"templates": ["[X] [Y]"] * 2}, "has no template 3"),
        ({"templates": ["[X] is"] * 3}, r"does not hold \[X\] and \[Y\] once"),
        ({"options": ["one"]}, "no list of two options"),
        ({"options": ["a", "a"]}, "no list of two options"),
        ({"domains": [1]}, "the domains are no list of texts"),
    ],
)
def test_a_bad_relation_is_named(tmp_path, relation, message):
    changed = {**RELATIONS["P2"], **relation} if isinstance(relation, dict) else relation
    write_facts(tmp_path / "bear", relations={**RELATIONS, "P2": changed})
    with pytest.raises(ValueError, match=message) as error:
        local_tasks(["bear_template_3"], tmp_path)
    assert "relations.json: relation 'P2'" in str(error.value) and "\n" not in str(error.value)


@needs_data
def test_the_published_facts_are_whole():
    rows = bear_rows(DATA / "bear", 0).rows
    assert len(rows) == 7731 and len({row["relation"] for row in rows[:60]}) == 60
    chance = sum(1 / len(row["text_options"]) for row in rows) / len(rows)
    assert chance == pytest.approx(0.0468, abs=5e-5)
