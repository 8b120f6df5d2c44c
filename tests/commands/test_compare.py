"""`idp-jax compare` from end to end: tables, files, and one line for what cannot be compared."""

import csv
import json
import re

import pytest

from idp_jax.analysis.tables import Cells, power_cells, written
from idp_jax.cli import main
from idp_jax.evaluation import read, write
from tests.datasets import DATA
from tests.evaluation.test_comparison import pair
from tests.evaluation.test_results import results, variant


@pytest.fixture
def files(tmp_path):
    """Two variants, each in a file of its own and both in a third."""
    first, second = pair(s=(8, 22), long_name_of_a_task=(40, 60))
    write(results(first), tmp_path / "a.json")
    write(results(second), tmp_path / "b.json")
    write(results(first, second), tmp_path / "both.json")
    return tmp_path


def compared(capsys, *arguments) -> str:
    """What the command prints."""
    main(["compare", *map(str, arguments)])
    return capsys.readouterr().err


def test_a_table_for_every_run(files, capsys):
    said = compared(capsys, files / "a.json", files / "b.json")
    assert "b against a" in said and "better" in said and "mean of 2 tasks" in said
    assert "8, 22" in said and ".0322" in said and max(map(len, said.splitlines())) <= 100
    assert "within 2 points" in said.replace("\n", "") and "…" not in said
    assert compared(capsys, files / "both.json") == said
    addresses = [f"{files / 'both.json'}:{name}" for name in "ab"]
    assert compared(capsys, *addresses) == said
    chosen = compared(capsys, files / "both.json", "--tasks", "s", "--margin", "5")
    assert "long_name" not in chosen and ".0161" in chosen
    assert "within 5 points" in chosen.replace("\n", "")


def test_runs_of_one_name_are_told_apart_by_place(files, capsys):
    write(results(pair(s=(8, 22), long_name_of_a_task=(0, 0))[0]), files / "c.json")
    said = compared(capsys, files / "a.json", files / "c.json")
    assert f"{files / 'c.json'} against" in said.replace("\n", " ")


def test_what_is_written(files, capsys):
    tables = [files / f"t{end}" for end in (".md", ".tex", ".csv")]
    compared(capsys, files / "both.json", "--out", files / "c.json", "--table", *tables)
    found = read(files / "c.json")
    assert found.comparisons[0].tests["s"].verdict == "better" and not found.variants
    assert found.config["margin"] == 2.0 and json.loads((files / "c.json").read_text())["schema"]
    rows = list(csv.reader(tables[2].read_text().splitlines()))
    assert rows[0][:2] == ["comparison", "task"] and rows[2][:4] == [
        "b against a",
        "s",
        "200",
        "50.0",
    ]
    assert rows[2][-1] == "better" and len(rows) == 4
    lines = tables[0].read_text().splitlines()
    assert lines[1].startswith("| --- | --- | ---: |") and len(lines) == 5
    assert r"long\_name\_of\_a\_task" in tables[1].read_text()


REFUSED = {
    "one run": (["a.json"], "is one run; give another"),
    "several variants": (["a.json", "both.json"], "both.json holds 'a', 'b'; name one: "),
    "no such task": (["both.json", "--tasks", "x"], "--tasks x: 'a' has s, long_name_of_a_task"),
    "nothing": ([], "give runs to compare, or --power"),
    "both": (["both.json", "--power", "450"], "give runs to compare, or --power"),
    "ending": (["both.json", "--table", "t.txt"], "must end in .md, .tex, .csv"),
    "its own": (["both.json:a", "both.json:b", "--out", "both.json", "--overwrite"], "--out .* is"),
    "exists": (["both.json", "--out", "a.json"], "a.json exists; give another --out, or --over"),
    "margin": (["both.json", "--margin", "0"], "--margin 0.0 must be at least"),
    "wide": (["both.json", "--margin", "200"], "--margin 200.0 is in points"),
    "power": (["--power", "many"], "--power many: give a number of items"),
    "no items": (["--power", "a=0"], "--power a=0: give a number of items"),
    "share": (["--power", "9", "--discordance", "2"], "--discordance 2.0 is no share"),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_compared_is_said_in_a_line(files, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(files)
    with pytest.raises(SystemExit) as stop:
        main(["compare", *arguments])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1 and re.search(message, said)


def test_power_before_a_run(tmp_path, capsys):
    said = compared(capsys, "--power", "450", "bear=7731", "--table", tmp_path / "p.md")
    assert "2.95" in said and "0.71" in said and "3,923" in said
    assert (tmp_path / "p.md").read_text().startswith("| task | items | 5 % differ |")


@pytest.mark.skipif(not (DATA / "sciq").is_dir(), reason="no local task data")
def test_items_of_local_tasks_are_counted(capsys):
    assert "1,000" in compared(capsys, "--power", "sciq", "--task-data", DATA)
    with pytest.raises(SystemExit):
        main(["compare", "--power", "no_such_task", "--task-data", str(DATA)])
    assert "--power no_such_task: there is no task" in capsys.readouterr().err


def test_a_mean_of_tasks_shows_less_than_each():
    rows = power_cells({"a": 400, "b": 400}, (0.1, 0.001), 0.02).rows
    each, mean = float(rows[0][2]), float(rows[2][2])
    assert mean == pytest.approx(each / 2**0.5, abs=0.01) and rows[3][3] == "none"


def test_marks_of_a_format_are_escaped():
    cells = Cells(("a_b", "c"), [("x|y & 5 %", "~^\\")])
    assert r"| x\|y & 5 % |" in written(cells, ".md")
    assert r"x|y \& 5 \% & \textasciitilde{}\textasciicircum{}\textbackslash{} \\" in written(
        cells, ".tex"
    )
    assert variant().name in written(Cells(("n",), [(variant().name,)]), ".csv")
