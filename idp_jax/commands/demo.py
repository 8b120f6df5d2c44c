"""`idp-jax demo`: an experiment on a small model; prints its tables and what they say."""

import time

from idp_jax import config, experiments
from idp_jax.commands.tables import change_table, chosen, comparison_table, output, show, task_table
from idp_jax.jobs.progress import Bars, console


def run(settings: config.Experiment) -> None:
    """Runs what is not yet done and prints the tables."""
    started = time.perf_counter()
    say = lambda stage: console.print(stage, highlight=False)
    results = experiments.run(settings, progress=Bars(), begin=say)
    out = output()
    budget = f"{settings.train_tokens:,} training tokens per adapter"
    show(comparison_table(results.variants, f"{settings.title}; {budget}"), out)
    show(task_table(results.variants, f"{settings.tasks}, % [95 %]"), out)
    show(change_table(results.comparisons, "what changed [95 %]"), out)
    for row in results.variants:
        if row.role == "repaired" and row.choices:
            out.print(f"{row.name} chose: {chosen(row, row.choices)}.", highlight=False)
    seconds = time.perf_counter() - started
    machine = results.environment
    out.print(
        f"{machine['device']}, {machine['cpu_cores']} cores; {seconds:.0f} s; "
        f"everything is in {settings.out}/ (results.json, figure.png)",
        highlight=False,
    )
