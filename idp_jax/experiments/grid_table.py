"""A grid as tables for a page and for a paper, and as tidy lines for a program.

The invariant: points are shown with both of their intervals, over items and over seeds, and an
oracle is called a bound wherever it stands.
"""

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

from idp_jax.analysis.tables import Cells, written
from idp_jax.config import Reproduce
from idp_jax.config.experiment import ORACLE
from idp_jax.config.reproduce import SUMMED
from idp_jax.evaluation.comparison import MARGIN
from idp_jax.evaluation.grid_results import Contrast, Grid, Row
from idp_jax.evaluation.statistics import Estimate
from idp_jax.experiments import cells
from idp_jax.jobs.progress import counted

Column = tuple[str, Callable[[Any], str]]  # a heading, and a row's cell

_TIDY = (
    *("model", "compression", "variant", "role", "seeds", "parameters"),
    *("measure", "against", "over", "value", "low", "high"),
)


def tables(settings: Reproduce, grid: Grid, suffix: Literal[".md", ".tex"]) -> str:
    """All tables in one text."""
    comment = suffix == ".tex"
    parts = [f"% {legend(settings, grid)}" if comment else legend(settings, grid)]
    for title, table in printed(grid):
        heading = f"% {title}\n" if comment else f"### {title}\n\n"
        parts.append(heading + written(table, suffix).rstrip())
    return "\n\n".join(parts) + "\n"


def printed(grid: Grid) -> Iterator[tuple[str, Cells]]:
    """Every table with its title."""
    for title, columns, rows in _tables(grid):
        lines = [[cell(row) for _, cell in columns] for row in rows]
        yield title, Cells([name for name, _ in columns], lines)


def legend(settings: Reproduce, grid: Grid) -> str:
    """What the numbers are of, and which cells are missing, in one paragraph."""
    missing = f"; not finished: {'; '.join(grid.missing)}" if grid.missing else ""
    return (
        f"{counted(len(settings.seeds), 'seed')}, {settings.tokens:,} tokens for every training "
        f"and every prompt of a pool; `{SUMMED}`: one prompt of the pool's summed length, with the "
        "tokens of all its prompts. Accuracy in %, changes in points against the model without "
        "repair (of a compressed model and beside dense: against dense), tasks counted alike; [95 "
        "% over items (bootstrap), seeds averaged]; in the column of seeds [95 % over seeds "
        "(Student)]. Verdicts are of these seeds: turned signs of the items and, within "
        f"{100 * MARGIN:g} points, two one-sided tests, after Holm over the repairs of a model or "
        "the controls of its pools. Tasks at chance are no part of means and verdicts. "
        "Share: the part of the log-perplexity lost to compression that came back. "
        f"`{ORACLE}` takes each item's best prompt by its answer: a bound, no method{missing}."
    )


def _tables(grid: Grid) -> Iterator[tuple[str, list[Column], Sequence[Any]]]:
    for model, compression in grid.contrasts:
        rows = [
            row
            for row in grid.rows
            if row.model == model and row.compression in (None, compression)
        ]
        guessed = grid.at_chance[model]
        yield f"{model}, {compression}: accuracy", _accuracy(rows, guessed), rows
        yield f"{model}, {compression}: perplexity", _perplexity(rows), rows
        pairs = grid.contrasts[model, compression]
        if pairs:
            yield f"{model}, {compression}: what choosing gains", _choosing(pairs), pairs


def _accuracy(rows: list[Row], guessed: list[str]) -> list[Column]:
    names = list(dict.fromkeys(task for row in rows for task in row.tasks))
    found: list[Column] = [
        ("variant", lambda row: shown(row.name)),
        ("parameters", lambda row: f"{row.parameters:,}"),
        *(
            (
                f"{name} (at chance)" if name in guessed else name,
                lambda row, name=name: cells.percent(row.tasks.get(name)),
            )
            for name in names
        ),
    ]
    if len(names) > 1:
        found.append(("mean", lambda row: cells.percent(row.mean)))
    return [
        *found,
        *_change(lambda row: row.change),
    ]


def _change(of: Callable[[Any], Contrast | None]) -> list[Column]:
    """What a test says: points with both intervals, and the verdict."""
    test = lambda row: getattr(of(row), "test", None)
    return [
        ("change", lambda row: cells.percent(getattr(test(row), "difference", None), sign=True)),
        ("seeds", lambda row: cells.percent(getattr(of(row), "over_seeds", None), sign=True)),
        ("verdict", lambda row: getattr(test(row), "verdict", "")),
    ]


def _perplexity(rows: list[Row]) -> list[Column]:
    found: list[Column] = [
        ("variant", lambda row: shown(row.name)),
        ("perplexity", lambda row: cells.perplexity(row.perplexity)),
        ("times", lambda row: cells.times(row.change and row.change.ratio)),
        ("share", lambda row: cells.share(row.share)),
    ]
    if any(row.second_perplexity is not None for row in rows):
        found += [
            ("second text", lambda row: cells.perplexity(row.second_perplexity)),
            ("second, times", lambda row: cells.times(row.change and row.change.second_ratio)),
        ]
    return found


def _choosing(pairs: list[Contrast]) -> list[Column]:
    found: list[Column] = [
        ("pool", lambda pair: pair.second),
        ("over", lambda pair: shown(pair.first)),
        *_change(lambda pair: pair),
        ("perplexity, times", lambda pair: cells.times(pair.ratio)),
    ]
    if any(pair.second_ratio is not None for pair in pairs):
        found.append(("second, times", lambda pair: cells.times(pair.second_ratio)))
    return found


def shown(name: str) -> str:
    """A row's name for people: an oracle is no method."""
    return f"{name} (bound)" if name.endswith(f", {ORACLE}") else name


def tidy(grid: Grid) -> str:
    """Every number as a line of CSV: what of, against what, over what its interval is."""
    text = io.StringIO()
    writer = csv.DictWriter(text, _TIDY, lineterminator="\n")
    writer.writeheader()
    by_name = {(row.model, row.name): row for row in grid.rows}
    for row in grid.rows:
        own = {
            "model": row.model,
            "compression": row.compression or "",
            "variant": row.name,
            "role": row.role,
            "seeds": " ".join(map(str, row.seeds)),
            "parameters": row.parameters,
        }
        writer.writerows(own | line for line in _lines(row))
        for pair in grid.contrasts.get((row.model, row.compression or ""), []):
            if pair.second == row.name and (row.model, pair.first) in by_name:
                writer.writerows(own | line for line in _contrast(pair))
    return text.getvalue()


def _lines(row: Row) -> Iterator[dict[str, Any]]:
    for task, found in row.tasks.items():
        yield _line(f"accuracy of {task}", found, "items")
    yield from _given("accuracy", row.mean, "items")
    yield from _given("accuracy", row.over_seeds, "seeds")
    for name, value in (
        ("perplexity", row.perplexity),
        ("second perplexity", row.second_perplexity),
    ):
        if value is not None:
            yield {"measure": name, "value": value}
    yield from _given("share", row.share, "windows")
    for prompt, count in zip(row.prompts, row.choices or (), strict=False):
        yield {"measure": f"choices of {prompt}", "value": count}
    if row.change is not None:
        yield from _contrast(row.change)


def _contrast(pair: Contrast) -> Iterator[dict[str, Any]]:
    against = {"against": pair.first}
    for task, found in pair.tasks.items():
        yield _line(f"difference of {task}", found, "items") | against
    test = pair.test
    if test is not None:
        yield {"measure": "p", "value": test.p_value} | against
        yield {"measure": "p of equivalence", "value": test.equivalence} | against
        yield {"measure": "verdict", "value": test.verdict} | against
    for measure, found, over in (
        ("difference", None if test is None else test.difference, "items"),
        ("difference", pair.over_seeds, "seeds"),
        ("perplexity ratio", pair.ratio, "windows"),
        ("second perplexity ratio", pair.second_ratio, "windows"),
    ):
        yield from (line | against for line in _given(measure, found, over))


def _given(measure: str, found: Estimate | None, over: str) -> Iterator[dict[str, Any]]:
    if found is not None:
        yield _line(measure, found, over)


def _line(measure: str, found: Estimate, over: str) -> dict[str, Any]:
    numbers = {"value": found.value, "low": found.low, "high": found.high}
    return {"measure": measure, "over": over, **numbers}
