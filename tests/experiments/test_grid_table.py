"""Tables of hand-made results: numbers, forms and warnings."""

import csv
import io

from idp_jax.analysis.grid_figures import draw_grid
from idp_jax.cli import main
from idp_jax.evaluation.grid_results import aggregate
from idp_jax.experiments.grid_table import tables, tidy
from tests.evaluation.test_grid_results import THREE, cells, made, settings

MISSING = {key: value for key, value in cells().items() if key != ("m", None, 2)}


def lines(text, start):
    """The cells of the rows of Markdown that begin so."""
    rows = [line for line in text.splitlines() if line.startswith(f"| {start} |")]
    return [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]


def test_markdown_has_every_number_with_its_interval():
    text = tables(settings(), aggregate(settings(), cells()), ".md")
    heads = [line for line in text.splitlines() if line.startswith("###")]
    assert heads == [
        "### m, three: accuracy",
        "### m, three: perplexity",
        "### m, three: what choosing gains",
    ]
    accuracy, perplexity = lines(text, "three + prompt")
    assert accuracy[1] == "7" and accuracy[2].startswith("37.5 [")
    assert accuracy[-3].startswith("+18.8 [")
    assert accuracy[-2:] == ["+18.8 [-60.7, +98.2]", "undecided"]
    assert perplexity[1] == "42.52" and perplexity[2] == "0.472 [0.472, 0.472]"
    assert perplexity[3] == "0.375 [0.375, 0.375]"
    ((pool, over, points, *_),) = lines(text, "three + idp")[2:]
    assert (pool, over) == ("three + idp", "three + idp, random") and points.startswith("+12.5 [")
    assert "not finished" not in text


def test_missing_cells_and_bounds_are_said():
    own = settings()
    text = tables(own, aggregate(own, MISSING), ".md")
    assert "not finished: m, dense, seed 2." in text
    bound = {"three + idp, oracle": THREE["three + idp"]}
    grid = aggregate(own, cells() | {("m", "three", s): made(THREE | bound, s) for s in (1, 2)})
    assert lines(tables(own, grid, ".md"), "three + idp, oracle (bound)")


def test_latex_is_the_same_table():
    text = tables(settings(), aggregate(settings(), cells()), ".tex")
    assert text.count(r"\begin{tabular}{lrrrrrrr}") == 1 and text.count(r"\bottomrule") == 3
    assert "three + prompt & 7 & 37.5 [" in text and "\n% m, three: accuracy\n" in text
    body = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert {line.count("&") for line in body[:7]} == {7}
    assert text.startswith("% 2 seeds, 2,048 tokens") and r"\caption" not in text


def test_csv_is_a_line_for_every_number():
    rows = list(csv.DictReader(io.StringIO(tidy(aggregate(settings(), cells())))))
    (one,) = [
        row
        for row in rows
        if row["variant"] == "three + prompt"
        and (row["measure"], row["over"]) == ("difference", "items")
    ]
    assert float(one["value"]) == 0.1875 and one["against"] == "three" and one["seeds"] == "1 2"
    against = [row for row in rows if row["against"] == "three + idp, random"]
    assert {row["over"] for row in against} == {"", "items", "seeds", "windows"}
    said = {row["measure"]: row["value"] for row in against if not row["over"]}
    assert said["verdict"] == "undecided" and 0 < float(said["p"]) <= 1
    assert {row["variant"] for row in against} == {"three + idp"}


def test_figures_are_drawn_also_of_what_is_missing(tmp_path):
    draw_grid(aggregate(settings(), cells()), tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"grid.png", "recovery.png", "choices.png"}
    for found in (MISSING, {}):
        draw_grid(aggregate(settings(), found), tmp_path)


def test_the_command_prints_the_tables(capsys, monkeypatch, tmp_path):
    own = settings()
    found = aggregate(own, MISSING)
    monkeypatch.setattr("idp_jax.experiments.run_grid", lambda *args, **options: found)
    file = tmp_path / "grid.yaml"
    file.write_text(
        "models: [m]\nout: o\ndata: {train: 'hub:c4', held_out: h.jsonl}\n"
        "compressions: {three: {}}\nrecipes: {idp: {method: idp}}\n"
    )
    main(["reproduce", str(file)])
    out = capsys.readouterr().out
    assert "m, three: what choosing gains" in out and "finished: m, dense, seed 2." in out
    assert "everything is in o/ (grid.md, grid.tex, grid.csv and figures)" in out
    assert max(map(len, out.splitlines())) <= 120
