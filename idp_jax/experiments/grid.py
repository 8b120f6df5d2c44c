"""Runs a grid cell by cell, and puts what is finished into tables and figures.

The invariant: a cell is an experiment that needs nothing of another cell, so calls on any number of
machines may share the grid's folder; what they print is a function of the finished cells alone.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from idp_jax import formats
from idp_jax.analysis.grid_figures import draw_grid
from idp_jax.config import Reproduce, Train
from idp_jax.config.reproduce import Cell
from idp_jax.evaluation.grid_results import Grid, aggregate
from idp_jax.evaluation.job import read_inputs
from idp_jax.evaluation.results import Results, read
from idp_jax.experiments import stages
from idp_jax.experiments.grid_table import tables, tidy
from idp_jax.experiments.held_out import check_enough
from idp_jax.experiments.measured import measurements
from idp_jax.experiments.runner import run
from idp_jax.formats.source import open_config
from idp_jax.jobs.files import write_text
from idp_jax.jobs.folder import check_writable, differences
from idp_jax.jobs.lock import Busy
from idp_jax.jobs.progress import SILENT, Progress, clock, counted
from idp_jax.models.config import from_hf
from idp_jax.recover.methods import METHODS
from idp_jax.training import Diverged
from idp_jax.training.checks import check as check_training
from idp_jax.training.plan import dtype_of, measured_rate, seconds_of

_FREE = ("out", "cache_teacher")  # of a cell, what changes no number


def run_grid(
    settings: Reproduce,
    *,
    progress: Progress = SILENT,
    say: Callable[[str], None] = lambda line: None,
) -> Grid | None:
    """Does the cells that this call was asked for and that are not yet done.

    Args:
        say: told what will be done, and each step before it.

    Returns:
        What all finished cells say, as it stands in grid.md, grid.tex and grid.csv; None where
        only the plan was asked for.

    Raises:
        ConfigError: settings that cannot be used, or a cell's folder holds another experiment.
        ValueError: a model, a text or a task cannot be used.
    """
    check_grid(settings)
    wanted = [cell for cell in settings.chosen_cells() if finished(cell) is None]
    if settings.plan:
        say(plan(settings, wanted).line)
        return None
    check_writable(settings.out)
    started = time.monotonic()
    for number, cell in enumerate(wanted):
        left = (time.monotonic() - started) / max(number, 1) * (len(wanted) - number)
        about = f" (about {clock(left)} left)" if number else ""
        say(f"cell {number + 1} of {len(wanted)}: {cell.name}{about}")
        try:
            run(cell.settings, progress=progress, begin=lambda stage: say(f"  {stage}"))
        except Busy as error:
            say(f"  passed over: {error}")
        except Diverged as error:
            say(f"  not finished: {error}; give the recipe a smaller learning rate")
    return collect(settings)


def collect(settings: Reproduce) -> Grid:
    """Writes the tables and figures of all cells that are finished."""
    done = [(cell, finished(cell)) for cell in settings.all_cells()]
    found = {
        (cell.model, cell.compression, cell.seed): results
        for cell, results in done
        if results is not None
    }
    grid = aggregate(settings, found)
    write_text(settings.out / "grid.md", tables(settings, grid, ".md"))
    write_text(settings.out / "grid.tex", tables(settings, grid, ".tex"))
    write_text(settings.out / "grid.csv", tidy(grid))
    draw_grid(grid, settings.out)
    return grid


def finished(cell: Cell) -> Results | None:
    """The results of a cell that is done with the settings that it has now, or None."""
    file = cell.settings.out / "results.json"
    if not file.is_file():
        return None
    results = read(file)
    return None if differences(results.config, cell.asked, _FREE) else results


def check_grid(settings: Reproduce) -> None:
    """Refuses what cannot be done, before anything is compressed or trained.

    Raises:
        ConfigError: a compression, recipe, task or text that cannot be used.
        ValueError: sizes that do not fit a model.
    """
    for model in settings.models:
        cells = [cell for cell in settings.all_cells() if cell.model == model]
        formats.resolve(model)
        for cell in cells[: 1 + len(settings.compressions)]:  # those of the first seed
            stages.check(cell.settings)
            for config in _trainings(cell):
                check_training(config, None)
        tokenizer = formats.load_tokenizer(model)
        tasks = replace(measurements(cells[0].settings)[0], perplexity=None, latency=True)
        read_inputs(tasks, tokenizer)
        if any(finished(cell) is None for cell in cells):
            check_enough(settings.data, tokenizer)


def _trainings(cell: Cell) -> list[Train]:
    """The trainings of a cell, beside the uncompressed model: its compressed one is not there."""
    held_out, found = str(cell.settings.data.held_out), []  # type: ignore[union-attr]
    for variant in stages.adapters(cell.settings).values():
        config = stages.training_of(cell.settings, variant)
        data = replace(config.data, validation=held_out)
        prefix = replace(config.prefix, by_damage=False)  # which no model is there to tell yet
        found.append(replace(config, model=cell.model, data=data, prefix=prefix))
    return found


class Plan(NamedTuple):
    """What is left to do.

    Attributes:
        cells, trainings, tokens: in all; each prompt of a pool has its own tokens.
        seconds: of the trainings, at the rate that was measured here.
        line: the same for people.
    """

    cells: int
    trainings: int
    tokens: int
    seconds: float
    line: str


def plan(settings: Reproduce, cells: list[Cell]) -> Plan:
    """Counts what cells train, and about how long that takes on this machine's first device."""
    trainings, tokens, seconds, rates = 0, 0, 0.0, {}
    for cell in cells:
        raw = open_config(cell.model)
        for config in _trainings(cell):
            key = cell.model, dtype_of(raw, config.dtype)
            step = settings.batch_size * settings.data.sequence_length
            if key not in rates:
                rates[key] = measured_rate(from_hf(raw), key[1], step)
            runs = len(METHODS[config.method].runs(config))
            trainings += 1
            tokens += config.steps * step * runs
            seconds += runs * seconds_of(config, from_hf(raw), rates[key])
    line = (
        f"{counted(len(cells), 'cell')} to do of {len(settings.all_cells())}: "
        f"{counted(trainings, 'training')}, {tokens:,} tokens, about {clock(seconds)} here; "
        "compression and scoring come on top"
    )
    return Plan(len(cells), trainings, tokens, seconds, line)
