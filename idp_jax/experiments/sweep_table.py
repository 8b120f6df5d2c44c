"""A sweep's results as cells of text, for a terminal's table and for Markdown alike.

The invariant: no number stands without what is needed to judge it: its interval, a mark where its
learning rate lies at the edge of the grid, and where a seed or a trial diverged.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from idp_jax.analysis.tables import Cells, written
from idp_jax.evaluation.sweep_results import Baseline, RecipeResult, SweepResults
from idp_jax.experiments import cells
from idp_jax.jobs.progress import counted

_EDGE = "*"


class Column(NamedTuple):
    """One column.

    Attributes:
        heading: without the words that a page needs no more than once.
        recipe, baseline: a row's cell.
        about: "recovery" or "cost"; a terminal shows the two apart.
    """

    heading: str
    recipe: Callable[[RecipeResult], str]
    baseline: Callable[[Baseline], str] = lambda row: ""
    about: str = "recovery"


def columns_of(results: SweepResults) -> list[Column]:
    """The columns that these results have something for."""
    first = results.baselines[0]
    found = [
        Column("recipe", lambda row: row.recipe, lambda row: row.name),
        Column("learning rate", _rate),
        Column("share, seeds", lambda row: cells.share(row.share)),
        Column("share, windows", lambda row: cells.share(row.share_windows)),
        Column(f"against {results.reference}", lambda row: cells.share(row.against, sign=True)),
        Column("perplexity", lambda row: cells.perplexity(row.perplexity), _own("perplexity")),
    ]
    if first.second_perplexity is not None:
        found += [
            Column(
                "second text",
                lambda row: cells.perplexity(row.second_perplexity),
                _own("second_perplexity"),
            ),
            Column("second, times", lambda row: cells.times(row.second_ratio)),
        ]
    for task in first.accuracy:
        found += [
            Column(
                f"{task} %",
                lambda row, task=task: cells.percent(row.accuracy.get(task)),
                lambda row, task=task: cells.percent(row.accuracy.get(task)),
                "cost",
            ),
            Column(
                "change",
                lambda row, task=task: cells.percent(row.accuracy_change.get(task), sign=True),
                about="cost",
            ),
        ]
    found += [
        Column("parameters", lambda row: f"{row.parameters:,}" if row.seeds else "", about="cost"),
        Column("tokens", lambda row: f"{row.tokens:,}" if row.seeds else "", about="cost"),
        Column("seconds", lambda row: f"{row.seconds:,.0f}" if row.seeds else "", about="cost"),
    ]
    if results.config.get("dense_controls"):
        found.append(Column("beside dense, times", _control, about="cost"))
    return found


def rows_of(results: SweepResults, compression: str, columns: Sequence[Column]) -> list[list[str]]:
    """The cells of a compressed model: dense, compressed, and each recipe."""
    bare = [row for row in results.baselines if row.name in ("dense", compression)]
    recipes = [row for row in results.recipes if row.compression == compression]
    rows = [[column.baseline(row) for column in columns] for row in bare]
    return rows + [[column.recipe(row) for column in columns] for row in recipes]


def markdown(results: SweepResults) -> str:
    """All tables, ready for a page."""
    columns, parts = columns_of(results), [legend(results)]
    for compression in dict.fromkeys(row.compression for row in results.recipes):
        rows = rows_of(results, compression, columns)
        table = written(Cells([column.heading for column in columns], rows), ".md")
        parts.append(f"### {compression}\n\n{table.rstrip()}")
    return "\n\n".join([*parts, _trials(results)]) + "\n"


def legend(results: SweepResults) -> str:
    """What the numbers are of, in one paragraph."""
    config, data, machine = results.config, results.config["data"], results.environment
    rates = counted(len(results.recipes[0].trials) if results.recipes else 0, "learning rate")
    seeds = counted(len(config["seeds"]), "seed")
    return (
        f"{config['model']}: each recipe had {rates} of {config['trial_tokens']:,} "
        f"tokens, chosen by {data['choosing_windows']} windows of {data['sequence_length']} tokens "
        f"that are not reported, then {seeds} of {config['tokens']:,} tokens. "
        f"Share: the part of the log-perplexity lost to compression that came back, on "
        f"{data['reported_windows']} other windows; [95 % over seeds (Student)], [95 % over "
        f"windows (paired bootstrap)]. `{_EDGE}`: the rate is at the edge of its grid. "
        f"{machine.get('device')}, {machine.get('cpu_cores')} cores."
    )


def _trials(results: SweepResults) -> str:
    """The trials, as a list: what each learning rate came to."""
    lines = []
    for row in results.recipes:
        tried = (f"{trial.learning_rate:g}: {_loss(trial.loss)}" for trial in row.trials)
        lines.append(f"- {row.compression}, {row.recipe}: {'; '.join(tried)}")
    return "Loss of every trial, nats a token:\n\n" + "\n".join(lines)


def _loss(value: float) -> str:
    return "diverged" if value == float("inf") else f"{value:.4f}"


def _rate(row: RecipeResult) -> str:
    if row.chosen is None:
        return "all diverged"
    failed = f", seed {', '.join(map(str, row.diverged))} diverged" if row.diverged else ""
    return f"{row.chosen:g}{_EDGE if row.edge else ''}{failed}"


def _own(name: str) -> Callable[[Any], str]:
    return lambda row: cells.perplexity(getattr(row, name))


def _control(row: RecipeResult) -> str:
    if row.control is None:
        return "diverged" if row.chosen is not None else ""
    return cells.times(row.control.perplexity)
