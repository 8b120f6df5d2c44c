"""The main job from end to end on a small model, in stages that each leave a file behind.

sample text -> compress -> train a pool of two prompts and a LoRA -> evaluate every variant ->
table, figure, results.json. A stage whose result is
there is not run again, so an interrupted demo goes on where it was.
"""

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from idp_jax import config, formats, training
from idp_jax.analysis.figures import comparison
from idp_jax.commands.compress import run as compress
from idp_jax.config.files import to_dict
from idp_jax.data.self_text import sample_documents
from idp_jax.data.text import read_text
from idp_jax.evaluation.harness_tasks import evaluate
from idp_jax.evaluation.latency import latency
from idp_jax.evaluation.perplexity import perplexity, windows_from_text
from idp_jax.evaluation.statistics import accuracy_interval, paired_difference
from idp_jax.formats import load_adapter
from idp_jax.jobs.files import write_text
from idp_jax.jobs.folder import claim
from idp_jax.jobs.machine import describe
from idp_jax.jobs.progress import Bars, console
from idp_jax.models import Decoder
from idp_jax.recover import Repaired

_WIDTH = 120  # of the tables where they are not shown in a terminal
_PARTS = ("train", "validation", "test")


def run(settings: config.Demo) -> dict[str, Any]:
    """Runs what is not yet done and prints the table.

    Returns:
        The contents of results.json.

    Raises:
        CheckpointError: there is no such model.
        ConfigError: the folder holds a demo with other settings.
    """
    formats.resolve(settings.model)  # a model that is not there leaves no folder behind
    claim(settings.out, settings)
    started = time.perf_counter()
    dense = _Lazy(lambda: formats.load_model(settings.model, progress=Bars().tracker("loading")))
    texts = _write_texts(settings, dense)
    compressed = _compress(settings, texts)
    adapters = _train(settings, compressed, texts)
    rows = _evaluate(settings, dense, compressed, adapters, texts)
    results = {
        "variants": rows,
        "budget": _budget(settings),
        "config": to_dict(settings),
        "environment": describe(),
        "seconds_of_this_call": time.perf_counter() - started,
    }
    write_text(settings.out / "results.json", json.dumps(results, indent=2))
    title = f"{settings.model}, {settings.compression.bits}-bit {settings.compression.method}"
    comparison(rows, title, settings.out / "figure.png")
    _print(settings, rows, results["seconds_of_this_call"])
    return results


class _Lazy:
    """A model that is loaded when it is first needed; a demo that goes on may not need it."""

    def __init__(self, load: Callable[[], Decoder]):
        self._load, self._model = load, None

    def __call__(self) -> Decoder:
        if self._model is None:
            self._model = self._load()
        return self._model


def _write_texts(settings: config.Demo, dense: _Lazy) -> dict[str, Path]:
    """Text of the uncompressed model's own, split by documents into training, validation and
    test.
    """
    files = {part: settings.out / "text" / f"{part}.jsonl" for part in _PARTS}
    if all(file.is_file() for file in files.values()):
        return files
    tokenizer = formats.load_tokenizer(settings.model)
    length, spare = settings.sequence_length, 2
    held_out = (settings.validation_windows // 2 + spare) * length
    calibration = settings.calibration_windows * length
    train = max(settings.train_tokens, calibration) + spare * length
    with Bars().bar("sampling text from the model", "tokens") as update:
        texts = sample_documents(
            dense(), tokenizer, train + 2 * held_out, seed=settings.seed, progress=update
        )
    wanted = {"test": held_out, "validation": held_out, "train": float("inf")}
    for part, tokens in wanted.items():
        own, count = [], 0
        while texts and count < tokens:
            own.append(texts.pop())
            count += len(tokenizer(own[-1])["input_ids"])
        write_text(files[part], "".join(json.dumps({"text": text}) + "\n" for text in own))
    return files


def _compress(settings: config.Demo, texts: dict[str, Path]) -> Path:
    out = settings.out / "compressed"
    if not out.is_dir():
        compress(
            config.Compress(
                model=settings.model,
                out=out,
                calibration=str(texts["train"]),
                samples=settings.calibration_windows,
                sequence_length=settings.sequence_length,
                batch_size=16,
                **to_dict(settings.compression),
            )
        )
    return out


def _train(settings: config.Demo, compressed: Path, texts: dict[str, Path]) -> dict[str, Path]:
    """Trains on the compressed model; the soft prompt is the pool's long one."""
    common = {
        "model": str(compressed),
        "pool_lengths": (settings.short_length, settings.long_length),
        "lora": settings.lora,
        "tokens": settings.train_tokens,
        "batch_size": settings.batch_size,
        "data": config.Data(
            train=str(texts["train"]),
            validation=str(texts["validation"]),
            validation_windows=settings.validation_windows // 2,
            sequence_length=settings.sequence_length,
        ),
        "evaluate_every": settings.evaluate_every,
        "seed": settings.seed,
    }
    rates = {"idp": settings.prompt_learning_rate, "lora": settings.lora_learning_rate}
    folders = {}
    for method, rate in rates.items():
        folder = settings.out / method
        optimizer = config.Optimizer(learning_rate=rate)
        training.train(
            config.Train(out=folder, method=method, optimizer=optimizer, **common), progress=Bars()
        )
        folders[method] = folder / "adapter"
    long_prompt = f"prompt_1_{settings.long_length}_tokens"
    return {
        "soft prompt": folders["idp"] / long_prompt,
        "IDP": folders["idp"],
        "LoRA": folders["lora"],
    }


def _evaluate(settings, dense: _Lazy, compressed: Path, adapters, texts) -> list[dict[str, Any]]:
    """Scores every variant; each result is a file of its own."""
    base = _Lazy(
        lambda: formats.load_model(compressed, weights="auto", progress=Bars().tracker("loading"))
    )
    repaired = {name: partial(_repair, base, folder) for name, folder in adapters.items()}
    variants = {
        "dense": lambda: Repaired.of(dense()),
        "compressed": lambda: Repaired.of(base()),
        **repaired,
        "IDP, random choice": lambda: repaired["IDP"]().with_selector("random"),
    }
    tokenizer = formats.load_tokenizer(settings.model)
    windows = windows_from_text(
        tokenizer,
        read_text(texts["test"]),
        settings.sequence_length,
        settings.validation_windows // 2,
    )
    rows = []
    for name, make in variants.items():
        file = settings.out / "evaluation" / f"{name.replace(',', '').replace(' ', '_')}.json"
        if not file.is_file():
            write_text(
                file, json.dumps(_score(settings, name, make(), tokenizer, windows), indent=2)
            )
        rows.append(json.loads(file.read_text()))
    reference = rows[1]["items"]
    for row in rows:
        change = paired_difference(reference, row["items"], seed=settings.seed)
        row["change"] = {"value": change.value, "low": change.low, "high": change.high}
    return rows


def _repair(base: _Lazy, folder: Path) -> Repaired:
    """The adapter in `folder` beside the model that `base` loads."""
    return load_adapter(base(), folder)


def _score(settings, name: str, repaired: Repaired, tokenizer, windows) -> dict[str, Any]:
    console.print(f"evaluating: {name}", highlight=False)
    text = perplexity(repaired, windows, progress=Bars().tracker("perplexity"))
    tasks = evaluate(
        repaired,
        tokenizer,
        tasks=["knowledge"],
        limit=settings.items,
        batch_size=8,
        progress=Bars(),
    )
    domains, items = {}, []
    for task, samples in sorted(tasks["samples"].items()):
        correct = samples["acc"]
        domains[task.removeprefix("knowledge_")] = _interval(correct)
        items += correct
    with Bars().bar("latency") as update:
        update(0, 1)
        times = latency(repaired, batch_size=1, prompt_length=64, new_tokens=16, repeats=5)
        update(1, 1)
    return {
        "name": name,
        "perplexity": text.perplexity,
        "perplexity_tokens": text.tokens,
        "accuracy": _interval(items),
        "domains": domains,
        "items": items,
        "extra_parameters": _extra_parameters(settings, name),
        "latency": times,
        "choices": _choices(settings, tasks["prompt_choices"]),
    }


def _interval(correct: list[float]) -> dict[str, float]:
    estimate = accuracy_interval(correct)
    return {
        "value": estimate.value,
        "low": estimate.low,
        "high": estimate.high,
        "items": len(correct),
    }


def _choices(settings, histograms: dict[str, list[int]]) -> dict[str, int] | None:
    total = [sum(counts) for counts in zip(*histograms.values(), strict=True)]
    lengths = (settings.short_length, settings.long_length)
    names = [f"{length} tokens" for length in lengths]
    return dict(zip(names, total, strict=True)) if total else None


def _extra_parameters(settings, name: str) -> int:
    """From the trained adapter's own count."""

    def counted(method: str) -> dict[str, Any]:
        return json.loads((settings.out / method / "result.json").read_text())

    if name.startswith("IDP"):
        return counted("idp")["extra_parameters"]
    if name == "LoRA":
        return counted("lora")["extra_parameters"]
    if name == "soft prompt":
        total = counted("idp")["extra_parameters"]
        return total * settings.long_length // (settings.short_length + settings.long_length)
    return 0


def _budget(settings) -> dict[str, int]:
    calibration = settings.calibration_windows * settings.sequence_length
    return {"calibration_tokens": calibration, "training_tokens_per_adapter": settings.train_tokens}


def _print(settings, rows: list[dict[str, Any]], seconds: float) -> None:
    out = Console(width=None if sys.stdout.isatty() else _WIDTH)
    out.print(_main_table(settings, rows))
    out.print(_domain_table(rows))
    lower = [row["name"] for row in rows[2:] if row["perplexity"] < rows[1]["perplexity"]]
    out.print(f"Lower perplexity than compressed: {', '.join(lower) or 'none'}.", highlight=False)
    for row in rows[2:]:
        change = row["change"]
        sure = "a real change" if change["low"] > 0 or change["high"] < 0 else "no clear change"
        out.print(
            f"{row['name']}: knowledge {100 * change['value']:+.1f} points against compressed "
            f"[{100 * change['low']:+.1f}, {100 * change['high']:+.1f}]: {sure}.",
            highlight=False,
        )
    pool = next(row for row in rows if row["name"] == "IDP")
    out.print(
        f"IDP chose: {', '.join(f'{k} {v}x' for k, v in pool['choices'].items())}.", highlight=False
    )
    out.print(
        f"{jax.devices()[0].device_kind}, {describe()['cpu_cores']} cores; {seconds:.0f} s; "
        f"everything is in {settings.out}/ (results.json, figure.png)",
        highlight=False,
    )


def _main_table(settings, rows: list[dict[str, Any]]) -> Table:
    budget = _budget(settings)
    table = Table(
        title=f"{settings.model}, {settings.compression.method} {settings.compression.bits} bit "
        f"group {settings.compression.group_size}; {budget['training_tokens_per_adapter']:,} "
        "training tokens per adapter"
    )
    table.add_column("variant")
    for column in ("perplexity", "knowledge % [95 %]", "extra params", "prefill ms", "ms/token"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        times = row["latency"]
        table.add_row(
            row["name"],
            f"{row['perplexity']:.2f}",
            _percent(row["accuracy"]),
            f"{row['extra_parameters']:,}",
            f"{times['prefill_ms']:.0f}",
            f"{times['decode_ms_per_token']:.1f}",
        )
    return table


def _domain_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="knowledge by domain, % [95 %]")
    table.add_column("domain")
    shown = [row for row in rows if "random" not in row["name"]]
    for row in shown:
        table.add_column(row["name"], justify="right", no_wrap=True)
    for domain in rows[0]["domains"]:
        table.add_row(
            domain.replace("_", " "), *(_percent(row["domains"][domain]) for row in shown)
        )
    return table


def _percent(interval: dict[str, float]) -> str:
    value, low, high = (100 * interval[key] for key in ("value", "low", "high"))
    return f"{value:.1f} [{low:.0f},{high:.0f}]"
