"""Tables of comparisons as cells of text, and as Markdown, LaTeX or CSV.

The invariant: what is written into a file are the cells that a terminal shows.
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

from idp_jax.evaluation.paired import PooledTest, TaskTest, items_needed, smallest_difference
from idp_jax.evaluation.results import Comparison
from idp_jax.evaluation.statistics import Estimate

_LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        **{mark: rf"\{mark}" for mark in "&%$#_{}"},
    }
)


@dataclass(frozen=True)
class Cells:
    """A table: words in the first `words` columns, numbers in the others."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 1


def comparison_cells(pair: Comparison) -> Cells:
    """A row for each task, then one for the mean of those that are tested."""
    columns = ("task", "items", "first", "second", "change [95 %]", "lost, gained")
    tests = ("p", "p equal", "shows", "verdict")
    rows = [_task(name, test, pair.tasks[name]) for name, test in pair.tests.items()]
    if pair.pooled is not None and len(pair.tests) > 1:
        rows.append(_pooled(pair.pooled))
    return Cells((*columns, *tests), rows)


def joined_cells(pairs: Sequence[Comparison]) -> Cells:
    """All comparisons below each other, for a file."""
    tables = [comparison_cells(pair) for pair in pairs]
    rows = [
        [f"{pair.second} against {pair.first}", *row]
        for pair, table in zip(pairs, tables, strict=True)
        for row in table.rows
    ]
    return Cells(("comparison", *tables[0].columns), rows, words=2)


def power_cells(items: dict[str, int], discordance: Sequence[float], margin: float) -> Cells:
    """The smallest difference that items show, a column for each share of those that differ.

    Args:
        items: of each task.
        margin: a share; the last row says how many items show it.
    """
    points = lambda value: f"{100 * value:.2f}" if value <= 1 else "none"
    shown = {name: [smallest_difference(n, d) for d in discordance] for name, n in items.items()}
    rows = [[name, f"{items[name]:,}", *map(points, row)] for name, row in shown.items()]
    if len(items) > 1:
        columns = zip(*shown.values(), strict=True)
        means = [sum(x**2 for x in column) ** 0.5 / len(items) for column in columns]
        total = f"{sum(items.values()):,}"
        rows.append([f"mean of {len(items)} tasks", total, *map(points, means)])
    needed = [items_needed(margin, share) for share in discordance]
    counts = ["none" if count is None else f"{count:,}" for count in needed]
    rows.append([f"items that show {100 * margin:g} points", "", *counts])
    return Cells(("task", "items", *(f"{100 * share:g} % differ" for share in discordance)), rows)


def written(cells: Cells, suffix: str) -> str:
    """The text of a table's file.

    Args:
        suffix: .md, .tex (of the package booktabs) or .csv.
    """
    table = [list(cells.columns), *map(list, cells.rows)]
    if suffix == ".csv":
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(table)
        return text.getvalue()
    numbers = len(cells.columns) - cells.words
    if suffix == ".md":
        table = [[cell.replace("|", r"\|") for cell in row] for row in table]
        table.insert(1, ["---"] * cells.words + ["---:"] * numbers)
        return "".join(f"| {' | '.join(row)} |\n" for row in table)
    lines = [" & ".join(cell.translate(_LATEX) for cell in row) + r" \\" for row in table]
    head = rf"\begin{{tabular}}{{{'l' * cells.words}{'r' * numbers}}}"
    parts = [head, r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule"]
    return "\n".join([*parts, r"\end{tabular}"]) + "\n"


def _task(name: str, test: TaskTest, change: Estimate) -> list[str]:
    # Without a test of equivalence in points, it is measured in something else.
    points = test.equivalence is not None
    scale, form = (100.0, ".1f") if points else (1.0, ".4f")
    flips = "" if test.losses is None else f"{test.losses}, {test.gains}"
    shown = name if test.metric in ("acc", "exact_match") else f"{name} {test.metric}"
    items = f"{test.items:,}" + ("" if test.clusters is None else f" in {test.clusters}")
    means = (f"{scale * value:{form}}" for value in (test.first, test.second))
    reach = "" if test.smallest is None else f"{scale * test.smallest:{form}}"
    said = test.verdict
    if test.at_chance:
        said = "at chance" if said == "undecided" else f"{said}, at chance"
    chances = _p(test.adjusted), _p(test.equivalence)
    return [shown, items, *means, _between(change, scale, form), flips, *chances, reach, said]


def _pooled(test: PooledTest) -> list[str]:
    change = _between(test.difference, 100, ".1f")
    reach = "" if test.smallest is None else f"{100 * test.smallest:.1f}"
    chances = _p(test.p_value), _p(test.equivalence)
    return [
        f"mean of {len(test.tasks)} tasks",
        *[""] * 3,
        change,
        "",
        *chances,
        reach,
        test.verdict,
    ]


def _p(value: float | None) -> str:
    return "" if value is None else "<.0001" if value < 1e-4 else f"{value:.4f}".lstrip("0")


def _between(change: Estimate, scale: float, form: str) -> str:
    value, low, high = (f"{scale * x:+{form}}" for x in (change.value, change.low, change.high))
    return f"{value} [{low}, {high}]"
