"""`idp-jax compare`: tests runs against the first of them, and prints a table for each."""

from dataclasses import replace
from pathlib import Path

from rich.table import Table

from idp_jax import __version__, config
from idp_jax.analysis.tables import Cells, comparison_cells, joined_cells, power_cells, written
from idp_jax.commands.tables import columns, show
from idp_jax.config.files import to_dict
from idp_jax.evaluation.comparison import compare_each
from idp_jax.evaluation.results import Comparison, Results, VariantResult, is_results, write
from idp_jax.evaluation.samples import read_runs
from idp_jax.jobs.files import write_text
from idp_jax.jobs.progress import console


def run(settings: config.Compare) -> None:
    """Compares runs, or says what they could show."""
    _check_places(settings)
    if settings.power:
        cells = power_cells(items_of(settings), settings.discordance, settings.margin / 100)
        show(table_of(cells, "smallest difference in points (5 %, power 80 %)"), console)
        _write_tables(settings, cells)
        return
    variants = runs_of(settings)
    pairs = compare_each(
        variants[:1] * (len(variants) - 1),
        variants[1:],
        metric=settings.metric,
        cluster=settings.cluster,
        margin=settings.margin / 100,
        seed=settings.seed,
    )
    for pair in pairs:
        show(table_of(comparison_cells(pair), f"{pair.second} against {pair.first}"), console)
        for line in remarks(pair):
            console.print(line, highlight=False)
    console.print(legend(settings), highlight=False)
    _write_tables(settings, joined_cells(pairs))
    if settings.out is not None:
        about = {"config": to_dict(settings), "environment": {"idp-jax": __version__}}
        write(Results(**about, variants=[], comparisons=pairs), settings.out)
        console.print(f"written to {settings.out}", highlight=False)


def runs_of(settings: config.Compare) -> list[VariantResult]:
    """The variants that are compared, the baseline first, each with a name of its own.

    Raises:
        ConfigError: fewer than two, or a task that none has.
    """
    addresses = {address: read_runs(address) for address in settings.runs}
    several = [address for address, found in addresses.items() if len(found) > 1]
    if several and len(addresses) > 1:
        names = ", ".join(repr(variant.name) for variant in addresses[several[0]])
        raise config.ConfigError(f"{several[0]} holds {names}; name one: {several[0]}:NAME")
    variants = [variant for found in addresses.values() for variant in found]
    if len(variants) < 2:
        raise config.ConfigError(
            f"{settings.runs[0]} is one run; give another one to compare with it"
        )
    if len({variant.name for variant in variants}) < len(variants):
        variants = [replace(v, name=address) for address, (v,) in addresses.items()]
    if not settings.tasks:
        return variants
    return [_only(variant, settings.tasks.split(",")) for variant in variants]


def _only(variant: VariantResult, tasks: list[str]) -> VariantResult:
    for task in tasks:
        if task not in variant.tasks:
            there = ", ".join(variant.tasks)
            raise config.ConfigError(f"--tasks {task}: {variant.name!r} has {there or 'no tasks'}")
    return replace(variant, tasks={task: variant.tasks[task] for task in tasks})


def items_of(settings: config.Compare) -> dict[str, int]:
    """How many items there will be, by task.

    Raises:
        ConfigError: neither a number above 0 nor a task whose items can be counted.
    """
    found: dict[str, int] = {}
    for given in settings.power:
        name, _, number = given.rpartition("=")
        if number.isdecimal() and int(number):
            found[name or f"{int(number):,} items"] = int(number)
        elif name or settings.task_data is None:
            raise config.ConfigError(
                f"--power {given}: give a number of items, as 450 or NAME=450, or a task with "
                "--task-data"
            )
        else:
            found |= _counted(given, settings.task_data)
    return found


def _counted(name: str, folder: Path) -> dict[str, int]:
    # The harness is slow to import, and nothing else here needs it.
    from idp_jax.evaluation.task_data import count_items

    try:
        return count_items(name, folder)
    except ValueError as error:
        raise config.ConfigError(f"--power {name}: {error}") from error


def table_of(cells: Cells, title: str) -> Table:
    """A table for the terminal."""
    table = columns(title, cells.columns[0], cells.columns[1:])
    table.box, table.padding = None, (0, 1, 0, 0)  # there are many columns
    for row in cells.rows:
        table.add_row(*row)
    return table


def remarks(pair: Comparison) -> list[str]:
    """What the table of a comparison has no column for."""
    said = []
    if pair.perplexity_ratio is not None:
        found = pair.perplexity_ratio
        said.append(f"perplexity: {found.value:.3f} times [{found.low:.3f}, {found.high:.3f}]")
    other = [name for name, test in pair.tests.items() if test.same_prompts is False]
    if other:
        said.append(f"the two read other prompts for the same items: {', '.join(other)}")
    if pair.pooled is None and pair.tests:
        said.append("no task is above chance and counts right items: no mean is tested")
    return said


def legend(settings: config.Compare) -> str:
    """What the verdicts mean."""
    clusters = f", clusters by {settings.cluster}" if settings.cluster else ""
    return (
        f"better, worse: p below .05 (exact McNemar, or turned signs; Holm over tasks{clusters}). "
        f"equivalent: within {settings.margin:g} points, p equal below .05 (TOST). "
        "undecided: neither. shows: the smallest difference that is seen with a power of 80 %. "
        "at chance: the first is not above guessing, and no part of the mean."
    )


def _check_places(settings: config.Compare) -> None:
    """Refuses to replace a file before anything is read."""
    out = settings.out
    if out is not None and out.exists() and not (settings.overwrite and is_results(out)):
        remedy = ", or --overwrite" if is_results(out) else ""
        raise config.ConfigError(f"{out} exists; give another --out{remedy}")
    for file in settings.table:
        if file.exists() and not settings.overwrite:
            raise config.ConfigError(f"{file} exists; give another --table, or --overwrite")


def _write_tables(settings: config.Compare, cells: Cells) -> None:
    for file in settings.table:
        write_text(file, written(cells, file.suffix))
        console.print(f"written to {file}", highlight=False)
