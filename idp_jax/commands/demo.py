"""`idp-jax demo`: an experiment on a small model; prints its tables and what they say."""

import sys
import time

from rich.console import Console

from idp_jax import config, experiments
from idp_jax.commands.tables import comparison_table, task_table
from idp_jax.evaluation.results import Comparison, Results, VariantResult
from idp_jax.jobs.progress import Bars, console

_WIDTH = 120  # of the tables where they are not shown in a terminal


def run(settings: config.Experiment) -> None:
    """Runs what is not yet done and prints the tables."""
    started = time.perf_counter()
    say = lambda stage: console.print(stage, highlight=False)
    results = experiments.run(settings, progress=Bars(), begin=say)
    out = Console(width=None if sys.stdout.isatty() else _WIDTH)
    budget = f"{settings.train_tokens:,} training tokens per adapter"
    out.print(comparison_table(results.variants, f"{settings.title}; {budget}"))
    out.print(task_table(results.variants, f"{settings.tasks}, % [95 %]"))
    for line in _verdicts(results):
        out.print(line, highlight=False)
    seconds = time.perf_counter() - started
    machine = results.environment
    out.print(
        f"{machine['device']}, {machine['cpu_cores']} cores; {seconds:.0f} s; "
        f"everything is in {settings.out}/ (results.json, figure.png)",
        highlight=False,
    )


def _verdicts(results: Results) -> list[str]:
    """What the comparisons say, and how the pools chose."""
    added = [pair for pair in results.comparisons if results.variant(pair.second).adapter]
    lower = [pair.second for pair in added if _is_lower(pair)]
    lines = [
        f"Perplexity surely lower than without adapter (95 %): {', '.join(lower) or 'none'}.",
        *(_verdict(pair) for pair in added),
    ]
    pools = (row for row in results.variants if row.role == "repaired" and row.choices)
    return [*lines, *(f"{row.name} chose: {_chosen(row)}." for row in pools)]


def _is_lower(pair: Comparison) -> bool:
    return pair.perplexity_ratio is not None and pair.perplexity_ratio.high < 1


def _verdict(pair: Comparison) -> str:
    change, ratio = pair.overall, pair.perplexity_ratio
    parts = []
    if change is not None:
        sure = "a real change" if change.excludes(0) else "no clear change"
        value, low, high = (100 * x for x in (change.value, change.low, change.high))
        parts.append(f"accuracy {value:+.1f} points [{low:+.1f}, {high:+.1f}], {sure}")
    if ratio is not None:
        parts.append(f"perplexity times {ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]")
    return f"{pair.second} against {pair.first}: {'; '.join(parts)}."


def _chosen(row: VariantResult) -> str:
    counts = zip(row.prompt_lengths, row.choices or (), strict=True)
    return ", ".join(f"{length} tokens {count}x" for length, count in counts)
