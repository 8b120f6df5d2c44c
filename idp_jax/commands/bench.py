"""`idp-jax bench`: times models and their repairs in turns, prints tables and what they mean."""

from pathlib import Path

from idp_jax import config
from idp_jax.analysis.bench_figure import draw_bench
from idp_jax.commands.tables import columns, show
from idp_jax.evaluation.bench import bench
from idp_jax.evaluation.bench_table import markdown, sentences, sheets
from idp_jax.jobs.files import write_file, write_text
from idp_jax.jobs.progress import Bars, console, is_first_process


def run(settings: config.Bench) -> None:
    """Times what the settings ask for, or plans it, and prints what was found."""
    figure = None if settings.plan else settings.figure
    written = [path for path in (settings.out, figure, settings.table) if path is not None]
    for path in written[settings.out is not None :]:
        _check_absent(path, settings)
    found = bench(settings, progress=Bars())
    if not is_first_process():
        return
    for sheet in sheets(found):
        first, *others = sheet.headings
        table = columns(sheet.title, first, others)
        for row in sheet.rows:
            table.add_row(*row)
        show(table, console)
    for line in sentences(found):
        console.print(line, highlight=False, soft_wrap=True)
    if figure is not None:
        write_file(figure, lambda partial: draw_bench(found, partial))
    if settings.table is not None:
        write_text(settings.table, markdown(found))
    if written:
        console.print(f"written to {', '.join(map(str, written))}", highlight=False)


def _check_absent(path: Path, settings: config.Bench) -> None:
    """Refuses to write over the figure or table of something else."""
    if path.exists() and not settings.overwrite:
        raise config.ConfigError(f"{path} exists; give another place, or --overwrite")
