"""The stages of an experiment: text, compressed models, adapters, measurements.

Each stage leaves files in the experiment's folder. The invariant: a stage whose result is there is
not run again, and its result does not depend on how often the experiment was stopped.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from idp_jax import formats, training
from idp_jax.compression.job import Job
from idp_jax.config import (
    Compress,
    Data,
    Experiment,
    Measurement,
    Train,
    Variant,
)
from idp_jax.config.experiment import taught
from idp_jax.config.files import from_dict, to_dict
from idp_jax.data.self_text import sample_documents
from idp_jax.evaluation.job import measure
from idp_jax.evaluation.results import VariantResult
from idp_jax.experiments.once import check_unchanged, compress_once, measure_once
from idp_jax.formats.adapters import read_adapter
from idp_jax.jobs.files import contents, fingerprint, write_text
from idp_jax.jobs.marker import mark
from idp_jax.jobs.progress import Progress
from idp_jax.models import Decoder
from idp_jax.recover import Repaired
from idp_jax.recover.methods import parameter_count
from idp_jax.recover.selection import find_selector

PARTS = ("train", "validation", "test")
_CALIBRATION_BATCH = 16  # windows


def inputs(settings: Experiment) -> dict[str, dict[str, str]]:
    """The fingerprints of what an experiment reads."""
    found = {"model": fingerprint(formats.resolve(settings.model))}
    if settings.task_data is not None:
        found["task-data"] = contents(settings.task_data)
    return found


def needed(settings: Experiment) -> int:
    """Bytes that an experiment takes at least: of its text."""
    return 0 if (settings.out / "text").is_dir() else 3 * settings.train_tokens


def text_files(settings: Experiment) -> dict[str, Path]:
    """Where the parts of the text are."""
    return {part: settings.out / "text" / f"{part}.jsonl" for part in PARTS}


def write_texts(settings: Experiment, model: Callable[[], Decoder], progress: Progress) -> None:
    """Samples text from the uncompressed model, and splits it by documents into its parts."""
    files, kept = text_files(settings), settings.out / "text" / "sampled.jsonl"
    if all(file.is_file() for file in files.values()):
        kept.unlink(missing_ok=True)  # left by a call that was stopped just before this line
        check_unchanged(settings.out / "text")
        return
    tokenizer = formats.load_tokenizer(settings.model)
    length, spare = settings.sequence_length, 2
    held_out = (settings.validation_windows // 2 + spare) * length
    calibration = settings.calibration_windows * length
    train = max(settings.train_tokens, calibration) + spare * length
    with progress.bar("sampling text from the model", "tokens") as update:
        texts = sample_documents(
            model(),
            tokenizer,
            train + 2 * held_out,
            seed=settings.seed,
            progress=update,
            kept=kept,
        )
    wanted = {"test": held_out, "validation": held_out, "train": float("inf")}
    for part, tokens in wanted.items():
        chosen, count = [], 0
        while texts and count < tokens:
            chosen.append(texts.pop())
            count += len(tokenizer(chosen[-1])["input_ids"])
        write_text(files[part], "".join(json.dumps({"text": text}) + "\n" for text in chosen))
    kept.unlink(missing_ok=True)
    mark(settings.out / "text")


def model_of(settings: Experiment, compression: str | None) -> str:
    """The name or folder of a model of the experiment."""
    return settings.model if compression is None else str(_compress(settings, compression).out)


def compressed(settings: Experiment, name: str, progress: Progress) -> None:
    """Compresses the model by one of the recipes."""
    compress_once(_compress(settings, name), progress)


def _compress(settings: Experiment, name: str) -> Compress:
    common = {
        **to_dict(settings.compression),
        "model": settings.model,
        "out": settings.out / "models" / name,
        "calibration": str(text_files(settings)["train"]),
        "samples": settings.calibration_windows,
        "sequence_length": settings.sequence_length,
        "batch_size": _CALIBRATION_BATCH,
    }
    return from_dict(Compress, common | settings.compressions[name], f"compressions.{name}")


def adapters(settings: Experiment) -> dict[tuple[str | None, str], Variant]:
    """What must be trained, by compression and recipe, each with a variant that asks for it."""
    return {
        (variant.compression, variant.adapter.partition("/")[0]): variant
        for variant in settings.rows
        if variant.adapter is not None
    }


def trained(settings: Experiment, variant: Variant, progress: Progress) -> None:
    """Trains a variant's adapter beside its model."""
    training.train(_train(settings, variant), progress=progress)


def adapter_of(settings: Experiment, variant: Variant) -> Path | None:
    """The folder of a variant's adapter, or of that part of it which the variant names."""
    if variant.adapter is None:
        return None
    _, _, part = variant.adapter.partition("/")
    return _train(settings, variant).out / "adapter" / part


def _train(settings: Experiment, variant: Variant) -> Train:
    """Adapters of one recipe and several models lie in folders of their models' names."""
    name = str(variant.adapter).partition("/")[0]
    files = text_files(settings)
    data = Data(
        train=str(files["train"]),
        validation=str(files["validation"]),
        validation_windows=settings.validation_windows // 2,
        sequence_length=settings.sequence_length,
    )
    common = {
        "model": model_of(settings, variant.compression),
        "out": settings.out / "adapters" / (variant.compression or "dense") / name,
        "tokens": settings.train_tokens,
        "batch_size": settings.batch_size,
        "data": to_dict(data),
        "evaluate_every": settings.evaluate_every,
        "checkpoint_every": settings.evaluate_every,
        "seed": settings.seed,
    }
    cache = settings.out / "teacher" if settings.cache_teacher else None
    return taught(common | settings.adapters[name], settings.model, f"adapters.{name}", cache)


def result_file(settings: Experiment, variant: Variant) -> Path:
    """Where a variant's measurements are."""
    name = re.sub(r"[^\w.+-]+", "_", variant.name)
    return settings.out / "evaluation" / f"{name}.json"


def measured(
    settings: Experiment,
    variant: Variant,
    model: Callable[[], Decoder],
    tokenizer: Any,
    progress: Progress,
) -> VariantResult:
    """Measures a variant, into a file of results that holds it alone."""
    folder, measurement = adapter_of(settings, variant), _measurement(settings)

    def measure_it() -> list[VariantResult]:
        repaired, added = Repaired.of(model()), 0
        if folder is not None:
            adapter = read_adapter(repaired.decoder, folder)
            repaired, added = adapter.repair(repaired.decoder), parameter_count(adapter)
        if variant.selector is not None:
            repaired = repaired.with_selector(variant.selector)
        found = measure(
            repaired,
            tokenizer,
            measurement,
            progress=progress,
            name=variant.name,
            role=variant.role,
            model=model_of(settings, variant.compression),
            adapter=None if folder is None else str(folder),
            selector=variant.selector,
            extra_parameters=added,
        )
        return [found]

    asked = {**to_dict(measurement), "inputs": _measured_inputs(settings, variant)}
    return measure_once(result_file(settings, variant), asked, measure_it)[0]


def _measured_inputs(settings: Experiment, variant: Variant) -> dict[str, dict[str, str]]:
    """The fingerprints of what a variant's numbers are of."""
    folder = adapter_of(settings, variant)
    return {
        "model": fingerprint(formats.resolve(model_of(settings, variant.compression))),
        "adapter": {} if folder is None else contents(folder),
        "text": fingerprint(text_files(settings)["test"]),
    }


def _measurement(settings: Experiment) -> Measurement:
    return Measurement(
        tasks=settings.tasks,
        task_data=settings.task_data,
        limit=settings.items,
        perplexity=text_files(settings)["test"],
        sequence_length=settings.sequence_length,
        windows=settings.validation_windows // 2,
        latency=True,
        timing=settings.timing,
    )


def check(settings: Experiment) -> None:
    """Refuses recipes and selectors that cannot be used, before anything is done.

    Raises:
        ConfigError: a recipe has a setting that is none, or that is out of range.
        ValueError: there is no such selector.
    """
    jobs = [_compress(settings, name) for name in settings.compressions]
    for variant in adapters(settings).values():
        _train(settings, variant)
    for variant in settings.rows:
        if variant.selector is not None:
            find_selector(variant.selector)
    for job in jobs:
        Job(job)  # reads configurations alone
