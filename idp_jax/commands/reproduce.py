"""`idp-jax reproduce`: a grid of models, compressions, repairs and seeds; prints its tables."""

from idp_jax import config, experiments
from idp_jax.commands.tables import columns, output, show
from idp_jax.experiments.grid_table import legend, printed
from idp_jax.jobs.progress import Bars, console


def run(settings: config.Reproduce) -> None:
    """Does the cells that are not yet done and prints the tables of all that are."""
    say = lambda line: console.print(line, highlight=False, soft_wrap=True)
    grid = experiments.run_grid(settings, progress=Bars(), say=say)
    if grid is None:
        return
    out = output()
    for title, cells in printed(grid):
        table = columns(title, cells.columns[0], cells.columns[1:])
        for row in cells.rows:
            table.add_row(*row)
        show(table, out)
    out.print(legend(settings, grid), highlight=False)
    out.print(
        f"everything is in {settings.out}/ (grid.md, grid.tex, grid.csv and figures)",
        highlight=False,
    )
