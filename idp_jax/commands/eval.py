"""`idp-jax eval`: scores a model and prints one table for each variant."""

from idp_jax import config
from idp_jax.commands.tables import accuracy_table, chosen, show, variant_table
from idp_jax.evaluation.job import score
from idp_jax.jobs.progress import Bars, console, is_first_process


def run(settings: config.Evaluate) -> None:
    """Scores a model and prints what was measured."""
    results = score(settings, progress=Bars())
    if not is_first_process():
        return
    for variant in results.variants:
        show(variant_table(variant), console)
        for task, row in variant.tasks.items():
            if (by_kind := accuracy_table(task, row)) is not None:
                show(by_kind, console)
            if row.choices is not None:
                counts = chosen(variant, row.choices)
                console.print(f"{task}: prompts chosen: {counts}", highlight=False)
            for item, reason in row.refused.items():
                console.print(f"{task}: item {item} was not scored: {reason}", highlight=False)
    console.print(f"written to {settings.out}", highlight=False)
