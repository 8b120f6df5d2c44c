"""What the commands do: each loads, calls the library, writes its result and prints one table."""

import json
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.table import Table

from idp_jax import config, formats, training
from idp_jax.compress.driver import StageTimes, check_fit
from idp_jax.compress.driver import compress as compress_model
from idp_jax.config_files import to_dict
from idp_jax.data import SELF, documents, sample_documents, take_windows
from idp_jax.environment import describe
from idp_jax.evaluation.perplexity import perplexity, windows_from_text
from idp_jax.evaluation.run import evaluate as evaluate_tasks
from idp_jax.files import write_text
from idp_jax.formats.names import module_names
from idp_jax.formats.quantization import Packing, write_config
from idp_jax.models.decoder import Decoder
from idp_jax.progress import bar, console, tracker
from idp_jax.recover import Repaired, load_adapter
from idp_jax.sharding import mesh_of
from idp_jax.text import read_text


def compress(settings: config.Compress) -> dict[str, Any]:
    """Compresses a model into a folder; returns the report, which is also `compression.json` there.

    Raises:
        ValueError: settings that do not fit the model, too little calibration text, or a folder
            that exists.
    """
    formats.check_absent(settings.out, overwrite=settings.overwrite)
    times, started = StageTimes(), time.perf_counter()
    mesh = mesh_of(settings.mesh)
    with jax.set_mesh(mesh) if mesh is not None else nullcontext():
        with times.measure("load"):
            model = formats.load_model(
                settings.model, dtype=settings.dtype, mesh=mesh, progress=tracker("loading")
            )
            check_fit(model, settings)
        with times.measure("calibration text"):
            tokens = _calibration(settings, model) if settings.needs_data else None
        compressed, rows = compress_model(
            model,
            settings,
            tokens,
            batch_size=settings.batch_size,
            mesh=mesh,
            progress=tracker(f"compressing ({settings.method})"),
            times=times,
        )
        names = module_names(model.config).values()
        del model
    quantization = None
    if not settings.prunes:
        packing = Packing(settings.bits, settings.group_size, settings.symmetric)
        quantization = write_config(
            "gptq_v2", dict.fromkeys(names, packing), damping=settings.damping
        )
    report = {
        "config": to_dict(settings),
        "environment": describe(),
        "matrices": rows,
        "seconds": dict(times.seconds),
    }
    with times.measure("save"):
        formats.save_model(
            compressed,
            settings.out,
            like=settings.model,
            quantization=quantization,
            report=report,
            overwrite=settings.overwrite,
        )
    _print_compression(settings, rows, times, time.perf_counter() - started)
    return report


def _calibration(settings: config.Compress, model: Decoder) -> np.ndarray:
    tokenizer = formats.load_tokenizer(settings.model)
    length, count = settings.sequence_length, settings.samples
    if length > model.config.max_positions:
        raise config.ConfigError(
            f"--sequence-length {length} exceeds the model's {model.config.max_positions} positions"
        )
    if settings.calibration == SELF:
        wanted = (count + 1) * length
        with bar("sampling calibration text", "tokens") as update:
            texts = sample_documents(
                model,
                tokenizer,
                wanted,
                document_tokens=min(length, 512),
                seed=settings.seed,
                progress=update,
            )
        return take_windows(iter(texts), tokenizer, length, count, "the model's own text")
    shuffle = settings.order == "random"
    texts = documents(settings.calibration, seed=settings.seed, shuffle=shuffle)
    return take_windows(texts, tokenizer, length, count, settings.calibration)


def _print_compression(settings, rows: list[dict], times: StageTimes, wall: float) -> None:
    table = Table(title=f"{settings.model}: {settings.method}, mean over layers")
    measured = [
        key
        for key in ("relative_error", "sparsity", "damping", "retries", "dead_columns")
        if key in rows[0]
    ]
    for column in ("matrix", *measured):
        table.add_column(
            column.replace("_", " "), justify="left" if column == "matrix" else "right"
        )
    for name in dict.fromkeys(row["matrix"] for row in rows):
        own = [row for row in rows if row["matrix"] == name]
        means = [np.mean([row[key] for row in own]) for key in measured]
        table.add_row(name, *(f"{mean:.4g}" for mean in means))
    console.print(table)
    stages = ", ".join(f"{name} {seconds:.1f}" for name, seconds in times.seconds.items())
    console.print(f"seconds: {stages}; in all {wall:.1f} (compilation included)", highlight=False)
    console.print(f"written to {settings.out}", highlight=False)


def train(settings: config.Train) -> None:
    """Trains an adapter and says what came of it."""
    result = training.train(settings)
    for part in result.get("prompts", [result]):
        console.print(
            f"best validation perplexity {part['validation_perplexity']:.3f} at step "
            f"{part['best_step']}",
            highlight=False,
        )
    console.print(
        f"{result['extra_parameters']:,} parameters, {result['training_tokens']:,} tokens; "
        f"adapter in {Path(settings.out) / 'adapter'}",
        highlight=False,
    )


def evaluate(settings: config.Evaluate) -> dict[str, Any]:
    """Scores a model and writes the results with everything that is needed to repeat them."""
    if settings.out.is_dir():
        raise config.ConfigError(
            f"--out {settings.out} is a folder; give a file such as results.json"
        )
    model = formats.load_model(
        settings.model, dtype=settings.dtype, weights=settings.weights, progress=tracker("loading")
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
            repaired, windows, settings.batch_size, progress=tracker("perplexity")
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
