"""Damaged rows of task data: named by file and row, in one line, before any model is there."""

import gzip
import json

import pytest

from idp_jax.evaluation.task_data import local_tasks
from idp_jax.evaluation.task_rows import read_rows
from tests.evaluation.test_task_data import ROW, write_rows

GOOD = json.dumps({**ROW, "id": "0"})
PIQA = {"goal": "Sit", "sol1": "on it", "sol2": "in it", "label": 0}
HELLASWAG = {"ind": 1, "activity_label": "A", "ctx_a": "He", "ctx_b": "she", "label": "1"}
HELLASWAG["endings"] = ["a", "b", "c", "d"]

BAD_LINES = {
    "half": (GOOD[:40], "not JSON"),
    "list": ("[1]", "not a JSON object"),
    "empty object": ("{}", "not a JSON object"),
    "nan": (GOOD.replace('"0"', "NaN"), "NaN is no number"),
    "type": (GOOD.replace('"0"', "7"), "id is a whole number, in row 1 it is text"),
    "type inside": (GOOD.replace('"yes"', "[1]"), r"choices\.text\[\] is a list, in row 1"),
    "surrogate": (GOOD.replace("Is it?", "\\ud800"), r"question holds \\ud800, half of a char"),
    "surrogate in a key": (GOOD.replace('"id"', '"\\udfff"'), r"holds \\udfff"),
    "deep": (GOOD.replace('"0"', "[" * 50 + "]" * 50), "nested deeper than 32|it is text"),
    "very deep": (GOOD[:-1] + ', "x": ' + "[" * 10**5 + "]" * 10**5 + "}", "nested deeper"),
    "no answer": (GOOD.replace('Key": "B', 'Key": "E'), "arc_easy"),
    "no options": (GOOD.replace('["no", "yes"]', "[]"), "options|none of the 0"),
    "an empty option": (GOOD.replace('"yes"', '""'), "not a list of texts"),
    "field gone": (GOOD.replace('"question"', '"asked"'), "question|asked"),
}


@pytest.mark.parametrize(("line", "reason"), BAD_LINES.values(), ids=BAD_LINES)
def test_a_damaged_row_is_named(tmp_path, line, reason):
    file = tmp_path / "arc_easy" / "test.jsonl"
    file.parent.mkdir()
    file.write_text(f"{GOOD}\n\n{GOOD}\n{line}\n{GOOD}\n")
    if "asked" in line:  # what a row lacks is None, and is written so
        assert len(local_tasks(["arc_easy"], tmp_path)[0].test_docs()) == 4
        return
    with pytest.raises(ValueError, match=reason) as error:
        local_tasks(["arc_easy"], tmp_path)
    said = str(error.value)
    assert f"{file}:4: " in said and "\n" not in said and "mend or remove the row" in said


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (gzip.compress(GOOD.encode(), mtime=0)[:-12], "cannot be read"),
        (b"\x1f\x8b\x08 no gzip at all", "cannot be read"),
        (b"plain text", "cannot be read"),
        (gzip.compress(b"\n\n", mtime=0), "holds no rows"),
        (gzip.compress(b'{"a": "\xff"}', mtime=0), "not UTF-8"),
        (gzip.compress(GOOD.encode() + b'\n{"id": ' + b"9" * 30 + b"}", mtime=0), "jsonl.gz:2: "),
    ],
)
def test_a_damaged_file_is_named(tmp_path, content, reason):
    file = tmp_path / "test.jsonl.gz"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=reason) as error:
        read_rows(file)
    assert str(file) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("task", "row", "change"),
    [
        ("piqa", PIQA, {"label": 7}),
        ("piqa", PIQA, {"label": -1}),
        ("hellaswag", HELLASWAG, {"label": "none"}),
        ("hellaswag", HELLASWAG, {"ctx_b": None}),
        (
            "winogrande",
            {"sentence": "_ is", "option1": "a", "option2": "b", "answer": "1"},
            {"sentence": "is"},
        ),
        (
            "triviaqa",
            {"question": "Q", "answer": {"aliases": ["x"], "value": "x"}},
            {"answer": {"aliases": [], "value": "x"}},
        ),
    ],
)
def test_a_row_that_its_task_cannot_read_is_named(tmp_path, task, row, change):
    """Wherever the task's own file finds it out: in all rows at once, or item by item."""
    file = tmp_path / task / "validation.jsonl"
    file.parent.mkdir()
    rows = [row] * 5
    for place in (0, 3):
        damaged = [*rows[:place], {**row, **change}, *rows[place + 1 :]]
        file.write_text("".join(json.dumps(each) + "\n" for each in damaged))
        with pytest.raises(ValueError, match=rf"validation\.jsonl:{place + 1}: ") as error:
            local_tasks([task], tmp_path)
        assert "\n" not in str(error.value)
    # What is not asked for may be damaged.
    assert local_tasks([task], tmp_path, limit=2) if task != "hellaswag" else True


def test_marks_of_other_systems_are_no_damage(tmp_path):
    write_rows(tmp_path / "plain.jsonl", 3)
    plain = (tmp_path / "plain.jsonl").read_bytes()
    (tmp_path / "windows.jsonl").write_bytes(b"\xef\xbb\xbf" + plain.replace(b"\n", b"\r\n"))
    found = read_rows(tmp_path / "windows.jsonl")
    assert found.rows == read_rows(tmp_path / "plain.jsonl").rows and found.lines == [1, 2, 3]


def test_dates_and_missing_fields_are_read_as_they_stand(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"day": "2020-01-01"}\n{"day": "2020-01-02", "note": "late"}\n')
    assert read_rows(file).dataset()[:] == {
        "day": ["2020-01-01", "2020-01-02"],
        "note": [None, "late"],
    }
