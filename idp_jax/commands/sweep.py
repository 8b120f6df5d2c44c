"""`idp-jax sweep`: methods of recovery compared; prints a table for each compressed model."""

from idp_jax import config, experiments
from idp_jax.commands.tables import columns, output, show
from idp_jax.experiments.sweep_table import columns_of, legend, rows_of
from idp_jax.jobs.progress import Bars, console


def run(settings: config.Sweep) -> None:
    """Runs what is not yet done and prints the tables."""
    say = lambda line: console.print(line, highlight=False, soft_wrap=True)
    results = experiments.run_sweep(settings, progress=Bars(), say=say)
    if results is None:
        return
    out = output()
    names = dict.fromkeys(row.compression for row in results.recipes)
    for name in names:
        for about in ("recovery", "cost"):
            first, *others = columns_of(results)
            shown = [first, *(column for column in others if column.about == about)]
            table = columns(f"{name}: {about}", first.heading, [each.heading for each in shown[1:]])
            for row in rows_of(results, name, shown):
                table.add_row(*row)
            show(table, out)
    out.print(legend(results), highlight=False)
    out.print(
        f"everything is in {settings.out}/ (sweep.json, sweep.md, sweep.png)", highlight=False
    )
