"""`idp-jax eval`: scores a model, writes the results and prints one table."""

import json
from pathlib import Path
from typing import Any

from rich.table import Table

from idp_jax import config, formats
from idp_jax.config.files import to_dict
from idp_jax.data.text import read_text
from idp_jax.evaluation.harness_tasks import evaluate as evaluate_tasks
from idp_jax.evaluation.perplexity import perplexity, windows_from_text
from idp_jax.formats import load_adapter
from idp_jax.jobs.files import write_text
from idp_jax.jobs.machine import describe
from idp_jax.jobs.progress import Bars, console
from idp_jax.recover import Repaired


def run(settings: config.Evaluate) -> dict[str, Any]:
    """Scores a model and writes the results with everything that is needed to repeat them."""
    if settings.out.is_dir():
        raise config.ConfigError(
            f"--out {settings.out} is a folder; give a file such as results.json"
        )
    model = formats.load_model(
        settings.model,
        dtype=settings.dtype,
        weights=settings.weights,
        kernel=settings.kernel,
        progress=Bars().tracker("loading"),
    )
    tokenizer = formats.load_tokenizer(settings.model)
    repaired = (
        Repaired.of(model) if settings.adapter is None else load_adapter(model, settings.adapter)
    )
    results: dict[str, Any] = {"config": to_dict(settings), "environment": describe()}
    if settings.perplexity is not None:
        text = read_text(settings.perplexity)
        windows = windows_from_text(tokenizer, text, settings.sequence_length, settings.windows)
        measured = perplexity(
            repaired, windows, settings.batch_size, progress=Bars().tracker("perplexity")
        )
        results["perplexity"] = {
            "file": str(settings.perplexity),
            "perplexity": measured.perplexity,
            "tokens": measured.tokens,
            "windows": measured.windows,
            "per_window_nll": measured.per_window_nll.tolist(),
        }
    if settings.task_names:
        results["tasks"] = evaluate_tasks(
            repaired,
            tokenizer,
            tasks=settings.task_names,
            task_data=settings.task_data,
            limit=settings.limit,
            batch_size=settings.batch_size,
            num_fewshot=settings.num_fewshot,
            max_length=settings.max_length,
            seed=settings.seed,
            progress=Bars(),
        )
    write_text(settings.out, json.dumps(results, indent=2))
    _print_evaluation(settings, results)
    return results


def _print_evaluation(settings: config.Evaluate, results: dict[str, Any]) -> None:
    name = settings.model if settings.adapter is None else f"{settings.model} + {settings.adapter}"
    table = Table(title=name)
    for column in ("measure", "value", "95 %", "items"):
        table.add_column(column, justify="left" if column == "measure" else "right")
    if "perplexity" in results:
        own = results["perplexity"]
        label = f"perplexity ({Path(own['file']).name})"
        table.add_row(label, f"{own['perplexity']:.3f}", "", f"{own['windows']} windows")
    for task, row in results.get("tasks", {}).get("tasks", {}).items():
        values = {k: v for k, v in row.items() if isinstance(v, float)}
        for metric, value in values.items():
            interval = row["interval"].get(metric)
            shown = "" if interval is None else f"[{interval[0]:.3f}, {interval[1]:.3f}]"
            table.add_row(f"{task} {metric}", f"{value:.4f}", shown, str(row["items"]))
    console.print(table)
    for task, counts in results.get("tasks", {}).get("prompt_choices", {}).items():
        console.print(f"{task}: prompts chosen {counts}", highlight=False)
    console.print(f"written to {settings.out}", highlight=False)
