"""Task rows damaged at random: told by file and row in one line, or scored and nothing else moved.

Damage is drawn from a seed, so that a failure can be had again.
"""

import copy
import json
import random
import re
from functools import partial

import pytest

from idp_jax.evaluation.harness_tasks import evaluate
from idp_jax.evaluation.task_data import local_tasks
from tests.helpers import FUZZ_TRIES, tiny_decoder, tiny_tokenizer

ROWS = 4
VALUES = [
    None,
    True,
    -1,
    7,
    1.5,
    10**30,
    "",
    " ",
    "x",
    "_",
    "5",
    "\ud800",
    "\x00",
    "y" * 700,
    [],
    {},
]
VALUES += [[[]], [None], {"text": []}, float("nan"), "{{ question }}", "é" * 3]

# Log-probabilities of whole sentences, in float32.
approx = partial(pytest.approx, rel=1e-5, abs=1e-4)


def arc(i):
    return {
        "id": str(i),
        "question": f"Is it {i}?",
        "choices": {"text": ["no", "yes"], "label": ["A", "B"]},
        "answerKey": "B",
    }


def piqa(i):
    return {"goal": f"Sit {i}", "sol1": "on it", "sol2": "in it", "label": i % 2}


def hellaswag(i):
    row = {"ind": i, "activity_label": "A", "ctx_a": f"He {i}", "ctx_b": "she", "label": "1"}
    return {**row, "endings": ["a", "b", "c", "d"]}


def winogrande(i):
    return {"sentence": f"{i}: _ left.", "option1": "Al", "option2": "Bea", "answer": "1"}


def lambada(i):
    return {"text": f"Number {i} is the last word"}


def bear(i):
    return {"relation": "P1", "subject": f"Place {i}", "subject_aliases": [], "answer": i % 3}


RELATIONS = {
    "P1": {
        "templates": ["[X] lies in [Y].", "[Y] is where [X] lies.", "In [Y] there is [X]."],
        "options": ["Asia", "Africa", "Europe"],
        "domains": ["Geographic"],
    }
}

TASKS = {
    "arc_easy": ("test", arc),
    "piqa": ("validation", piqa),
    "hellaswag": ("validation", hellaswag),
    "winogrande": ("validation", winogrande),
    "lambada_openai": ("test", lambada),
    "bear": ("facts", bear),
}


def damaged(draw: random.Random, row: dict) -> bytes:
    """A row's line with one field changed, lost, added or moved, or with a byte changed."""
    row, line = copy.deepcopy(row), json.dumps(row).encode()
    how = draw.randrange(6)
    if how == 0:
        place = draw.randrange(len(line))
        return line[:place] + bytes([draw.randrange(256)]).replace(b"\n", b"") + line[place + 1 :]
    if how == 1:
        return line[: draw.randrange(1, len(line))]
    name = draw.choice(list(row))
    if how == 2:
        del row[name]
    elif how == 3:
        row[draw.choice(["extra", "label", "text"])] = draw.choice(VALUES)
    elif how == 4 and isinstance(row[name], list | dict) and row[name]:
        inside = row[name]
        inside[draw.choice(list(inside) if isinstance(inside, dict) else range(len(inside)))] = (
            draw.choice(VALUES)
        )
    else:
        row[name] = draw.choice(VALUES)
    return json.dumps(row).encode()


def scores(model, task, folder):
    """By document: every metric's scores, of the rows that were scored."""
    found = evaluate(
        model, tiny_tokenizer(), tasks=[task], task_data=folder, max_length=256, batch_size=4
    )
    return found.tasks[task]


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_damage_is_told_or_harms_no_other_row(tmp_path, task):
    draw = random.Random(task)
    model = tiny_decoder("llama", vocab_size=259, max_positions=512, num_layers=1)
    split, make = TASKS[task]
    file = tmp_path / task / f"{split}.jsonl"
    file.parent.mkdir()
    if task == "bear":
        (tmp_path / "bear" / "relations.json").write_text(json.dumps(RELATIONS))
    lines = [json.dumps(make(i)).encode() for i in range(ROWS)]
    file.write_bytes(b"\n".join(lines) + b"\n")
    whole = scores(model, task, tmp_path)
    refused = 0
    for _ in range(FUZZ_TRIES // len(TASKS)):
        place = draw.randrange(ROWS)
        line = damaged(draw, make(place))
        file.write_bytes(b"\n".join([*lines[:place], line, *lines[place + 1 :]]) + b"\n")
        try:
            found = scores(model, task, tmp_path)
        except ValueError as error:
            said = str(error)
            assert re.search(rf"{split}\.jsonl:[1-{ROWS}]\b", said) and "\n" not in said, (
                line,
                said,
            )
            refused += 1
            continue
        if line.strip() == b"" or found.items + len(found.refused) < ROWS:
            continue
        left = [i for i in range(ROWS) if i not in found.refused]
        for metric, values in found.samples.items():
            for i, value in zip(left, values, strict=True):
                # Batches are the same but for a row that was touched; sums may round otherwise.
                assert i == place or value == approx(whole.samples[metric][i]), (
                    line,
                    metric,
                )
    assert 0 < refused


@pytest.mark.slow
def test_damaged_relations_are_told_or_asked(tmp_path):
    """A relation is every fact's: it is refused by name, or its sentences can be asked."""
    draw, folder = random.Random("relations"), tmp_path / "bear"
    folder.mkdir()
    facts = "".join(json.dumps(bear(i)) + "\n" for i in range(ROWS))
    (folder / "facts.jsonl").write_text(facts)
    refused = 0
    for _ in range(FUZZ_TRIES):
        line = damaged(draw, RELATIONS["P1"])
        whole = b'{"P1": ' + line + b"}" if draw.random() < 0.9 else damaged(draw, RELATIONS)
        (folder / "relations.json").write_bytes(whole)
        try:
            (task,) = local_tasks([draw.choice(["bear", "bear_template_3"])], tmp_path)
        except ValueError as error:
            said = str(error)
            assert re.search(r"relations\.json|facts\.jsonl:1\b", said) and "\n" not in said, whole
            refused += 1
            continue
        assert len(task.test_docs()) == ROWS
    assert 0 < refused < FUZZ_TRIES
