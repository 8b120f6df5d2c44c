"""Tables that commands print: what was measured, what was compressed, what a job would take."""

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from idp_jax.config import Train
from idp_jax.evaluation.comparison import pooled_accuracy
from idp_jax.evaluation.results import (
    SEVERAL,
    Comparison,
    PerplexityResult,
    TaskResult,
    VariantResult,
)
from idp_jax.evaluation.statistics import Estimate
from idp_jax.jobs.progress import WIDTH, clock

if TYPE_CHECKING:  # they import jax, which a comparison of two files need not wait for
    from idp_jax.compression.plan import Plan
    from idp_jax.training.plan import Plan as TrainingPlan

# Column of the report of a compression: what it shows of several layers' numbers.
_SHOWN = {
    "relative_error": np.mean,
    "baseline_error": np.mean,
    "sparsity": np.mean,
    "damping": np.max,
    "retries": np.sum,
    "dead_columns": np.sum,
}
_SUMMARIES = {np.mean: "mean", np.max: "largest", np.sum: "sum"}


def output() -> Console:
    """Standard output, as wide as the terminal; into a file, as wide as people read."""
    return Console(width=None if sys.stdout.isatty() else WIDTH, markup=False)


def show(table: Table, console: Console) -> None:
    """Prints a table no wider than people read; what is too long is broken, not cut off."""
    console.print(table, width=min(console.width, WIDTH))


def columns(title: str, first: str, others: Sequence[str]) -> Table:
    """An empty table: words on the left, numbers on the right."""
    table = Table(title=title)
    table.add_column(first, overflow="fold")
    for name in others:
        table.add_column(name, justify="right", overflow="fold")
    return table


def percent(estimate: Estimate | None) -> str:
    """An accuracy with its interval, in percent."""
    if estimate is None:
        return ""
    value, low, high = (100 * x for x in (estimate.value, estimate.low, estimate.high))
    return f"{value:.1f} [{low:.0f},{high:.0f}]"


def variant_table(variant: VariantResult) -> Table:
    """All that was measured of one variant, a row for each number."""
    table = columns(variant.name, "measure", ("value", "95 %", "items"))
    text, times = variant.perplexity, variant.latency
    if text is not None:
        name = f"perplexity ({Path(text.file or 'text').name})"
        between = f"[{text.interval[0]:.3f}, {text.interval[1]:.3f}]" if text.interval else ""
        table.add_row(name, f"{text.perplexity:.3f}", between, f"{text.windows} windows")
    for task, row in variant.tasks.items():
        for metric, value in row.metrics.items():
            low_high = row.interval.get(metric)
            interval = f"[{low_high[0]:.3f}, {low_high[1]:.3f}]" if low_high else ""
            table.add_row(f"{task} {metric}", f"{value:.4f}", interval, str(row.items))
    for group, metrics in variant.groups.items():
        for metric, value in metrics.items():
            table.add_row(f"{group} (group) {metric}", f"{value:.4f}", "", "")
    if variant.mean_accuracy is not None:
        table.add_row("mean accuracy of what was asked for", f"{variant.mean_accuracy:.4f}", "", "")
    if times is not None:
        sizes = f"batch {times.batch_size}, {times.repeats} runs"
        table.add_row(
            f"ms, prefill of {times.prompt_length} tokens", f"{times.prefill_ms:.1f}", "", sizes
        )
        table.add_row("ms a token, decoding", f"{times.decode_ms_per_token:.2f}", "", sizes)
    return table


def accuracy_table(name: str, task: TaskResult) -> Table | None:
    """The main metric by domain and by relation of facts; None for a task without them."""
    fields = [field for field in ("domains", "relation") if field in task.labels]
    if task.accuracy is None or not fields:
        return None
    table = columns(f"{name}: {task.accuracy}, %", "items of", ("value [95 %]", "items"))
    for field in fields:
        counts = Counter(x for values in task.labels[field] for x in values.split(SEVERAL) if x)
        for label, estimate in sorted(task.accuracy_by(field).items()):
            table.add_row(label, percent(estimate), str(counts[label]))
        table.add_section()
    return table


def comparison_table(variants: Sequence[VariantResult], title: str) -> Table:
    """One row for each variant of an experiment."""
    numbers = ("perplexity [95 %]", "accuracy % [95 %]", "extra params", "prefill ms", "ms/token")
    table = columns(title, "variant", numbers)
    for row in variants:
        text, times = row.perplexity, row.latency
        table.add_row(
            row.name,
            _perplexity(text),
            percent(pooled_accuracy(row)),
            f"{row.extra_parameters:,}",
            f"{times.prefill_ms:.0f}" if times else "",
            f"{times.decode_ms_per_token:.1f}" if times else "",
        )
    return table


def _perplexity(text: PerplexityResult | None) -> str:
    if text is None or text.interval is None:
        return "" if text is None else f"{text.perplexity:.2f}"
    return f"{text.perplexity:.2f} [{text.interval[0]:.2f}, {text.interval[1]:.2f}]"


def task_table(variants: Sequence[VariantResult], title: str) -> Table:
    """One row for each task, one column for each variant that is no control."""
    shown = [variant for variant in variants if variant.role != "control"]
    table = columns(title, "task", [variant.name for variant in shown])
    tasks = variants[0].tasks
    # Tasks of a group begin with its name; where all do, the title says it.
    shared = (f"{group}_" for group in variants[0].groups)
    prefix = next((name for name in shared if all(task.startswith(name) for task in tasks)), "")
    for task in tasks:
        name = task.removeprefix(prefix).replace("_", " ")
        table.add_row(name, *(_accuracy(variant.tasks[task]) for variant in shown))
    return table


def change_table(comparisons: Sequence[Comparison], title: str) -> Table:
    """One row for each comparison; a direction is named only where the interval holds no other."""
    table = columns(title, "variant", ("against", "accuracy, points", "", "perplexity, times", ""))
    for pair in comparisons:
        points, ratio = pair.overall, pair.perplexity_ratio
        cells = ["", "", "", ""]
        if points is not None:
            value, low, high = (100 * x for x in (points.value, points.low, points.high))
            cells[:2] = f"{value:+.1f} [{low:+.1f}, {high:+.1f}]", _direction(points, 0)
        if ratio is not None:
            shown = f"{ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"
            cells[2:] = shown, _direction(ratio, 1)
        table.add_row(pair.second, pair.first, *cells)
    return table


def _direction(change: Estimate, nothing: float) -> str:
    if not change.excludes(nothing):
        return "unclear"
    return "higher" if change.value > nothing else "lower"


def chosen(variant: VariantResult, counts: Sequence[int]) -> str:
    """How often each prompt of a pool was chosen."""
    pairs = zip(variant.prompt_names, counts, strict=True)
    return ", ".join(f"{name} {count}x" for name, count in pairs)


def _accuracy(task: TaskResult) -> str:
    metric = task.accuracy
    if metric is None or metric not in task.interval:
        return ""
    return percent(Estimate(task.metrics[metric], *task.interval[metric]))


def plan_table(plan: "Plan", title: str, rates: dict[str, float] | None = None) -> Table:
    """What a compression will take; with `rates` (see `compress.plan.rates`) the time too."""
    table = columns(title, "memory", ("GB",))
    on = f"on each of {plan.devices} devices" if plan.devices > 1 else "on the device"
    for place, held in ((on, plan.device), ("on the host", plan.host)):
        for name, size in held.items():
            table.add_row(name, f"{size / 1e9:.2f}")
        table.add_row(_bold(place), f"{sum(held.values()) / 1e9:.2f}", end_section=True)
    table.add_row("embeddings, while the text enters", f"{plan.entry / 1e9:.2f}")
    if plan.devices == 1:
        table.add_row(_bold("at most, on a CPU"), f"{plan.peak / 1e9:.2f}")
    table.add_section()
    table.add_row("the result's matrices, on disk", f"{plan.disk / 1e9:.2f}", end_section=True)
    if rates is None:
        return table
    table.add_row(_bold("time"), _bold("s"), end_section=True)
    seconds = plan.seconds(rates)
    for kind, value in seconds.items():
        rate = "" if kind == "compilation" else f", at {rates[kind] / 1e9:.3g} G/s"
        table.add_row(f"{kind}{rate}", f"{value:,.0f}")
    table.add_row(_bold("in all"), f"{sum(seconds.values()):,.0f}")
    return table


def training_table(plans: Sequence["TrainingPlan"], settings: Train, rate: float) -> Table:
    """What a training will take, a column for each; the time at `rate` operations a second."""
    table = columns(f"{settings.model}: plan", "training", [plan.label for plan in plans])
    gb = lambda size: "" if size is None else f"{size / 1e9:.2f}"
    table.add_row("parameters", *(f"{plan.parameters:,}" for plan in plans))
    step_tokens = f"{settings.batch_size} x {settings.data.sequence_length:,} tokens"
    table.add_row(f"steps of {step_tokens}", *(f"{plan.steps:,}" for plan in plans))
    table.add_section()
    table.add_row("GB, model and state", *(gb(plan.held) for plan in plans))
    table.add_row("GB, in a step", *(gb(plan.work) for plan in plans))
    table.add_row(_bold("GB in all"), *(gb(plan.bytes) for plan in plans))
    table.add_row("GB that are free here", *(gb(plan.room) for plan in plans), end_section=True)
    times = [plan.seconds(rate) for plan in plans]
    table.add_row(f"time, at {rate / 1e9:.3g} G operations/s", *map(clock, times))
    if len(plans) > 1:
        table.add_row(_bold("in all"), clock(sum(times)), *[""] * (len(plans) - 1))
    return table


def compression_table(rows: list[dict[str, Any]], title: str) -> Table:
    """What a compression did: one row for each kind of matrix.

    Args:
        rows: of its report, from `compress.job.compress`.
    """
    measured = [key for key in _SHOWN if any(key in row for row in rows)]
    table = Table(title=title)
    table.add_column("matrix")
    table.add_column("stored as")
    for key in measured:
        name = f"{key.replace('_', ' ')} ({_SUMMARIES[_SHOWN[key]]})"
        table.add_column(name, justify="right")
    for name in dict.fromkeys(row["matrix"] for row in rows):
        layers = [row for row in rows if row["matrix"] == name]
        forms = dict.fromkeys(_form(row) for row in layers)
        values = {key: [row[key] for row in layers if key in row] for key in measured}
        cells = (f"{_SHOWN[key](found):.4g}" if found else "" for key, found in values.items())
        table.add_row(name, ", ".join(forms), *cells)
    return table


def _bold(text: str) -> Text:
    return Text(text, style="bold")


def _form(row: dict[str, Any]) -> str:
    if "bits" not in row:
        return row["method"]
    group = "row" if row["group_size"] == -1 else f"group {row['group_size']}"
    return f"{row['method']} {row['bits']} bit, {group}"
