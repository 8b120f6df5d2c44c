"""The last stage of an experiment: its variants are measured, each into a file of its own.

What a pool is held against besides other selectors needs no run of its own: its best fixed prompt
and its oracle are put together from each prompt's answers.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from idp_jax import formats
from idp_jax.config import Experiment, Measurement, Variant
from idp_jax.config.experiment import BEST, ORACLE, SECOND
from idp_jax.config.files import to_dict
from idp_jax.evaluation.job import measure
from idp_jax.evaluation.pool_bounds import oracle
from idp_jax.evaluation.results import VariantResult
from idp_jax.experiments.once import measure_once
from idp_jax.experiments.stages import adapter_of, model_of, text_files, training_of
from idp_jax.formats.adapters import read_adapter
from idp_jax.jobs.files import contents, fingerprint, read_json
from idp_jax.jobs.progress import Progress
from idp_jax.models import Decoder
from idp_jax.recover import Repaired
from idp_jax.recover.methods import parameter_count


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
) -> list[VariantResult]:
    """Measures a variant, into a file of results that holds it alone.

    Returns:
        The variant, and where there is a second text its perplexity there as another.
    """
    if variant.selector in (BEST, ORACLE):
        lengths = training_of(settings, variant).pool_lengths
        prompts = [_prompt(variant, number) for number in range(len(lengths))]
        found = [measured(settings, each, model, tokenizer, progress) for each in prompts]
        return _of_prompts(settings, variant, found)
    asked = measurements(settings)
    inputs = _inputs(settings, variant)

    def measure_it() -> list[VariantResult]:
        folder, repaired, added = adapter_of(settings, variant), Repaired.of(model()), 0
        if folder is not None:
            adapter = read_adapter(repaired.decoder, folder)
            repaired, added = adapter.repair(repaired.decoder), parameter_count(adapter)
        if variant.selector is not None:
            repaired = repaired.with_selector(variant.selector)
        return [
            measure(
                repaired,
                tokenizer,
                measurement,
                progress=progress,
                name=name,
                role=variant.role,
                model=model_of(settings, variant.compression),
                adapter=None if folder is None else str(folder),
                selector=variant.selector,
                extra_parameters=added,
            )
            for name, measurement in zip(names(variant), asked, strict=False)
        ]

    first, *second = map(to_dict, asked)
    known = {**first, "inputs": inputs} | ({"second": second} if second else {})
    return measure_once(result_file(settings, variant), known, measure_it)


def names(variant: Variant) -> tuple[str, str]:
    """What a variant is called in the results: there, and on the second text."""
    return variant.name, f"{variant.name}{SECOND}"


def _prompt(variant: Variant, number: int) -> Variant:
    """One prompt of a pool for every input."""
    name = f"{variant.compression or 'dense'} + {variant.adapter}, prompt {number}"
    return Variant(name, "control", variant.compression, variant.adapter, f"fixed(index={number})")


def _of_prompts(
    settings: Experiment, variant: Variant, prompts: list[list[VariantResult]]
) -> list[VariantResult]:
    """The best fixed prompt, or the oracle over all of them.

    Args:
        prompts: by prompt what was measured.
    """
    identity = {"role": variant.role, "selector": variant.selector}
    if variant.selector == ORACLE:
        found = [oracle(list(each)) for each in zip(*prompts, strict=True)]
    else:
        file = training_of(settings, variant).out / "result.json"
        runs = read_json(file, "remove it, and the same command goes on")["prompts"]
        found = prompts[min(range(len(runs)), key=lambda each: runs[each]["validation_loss"])]
    pairs = zip(found, names(variant), strict=False)
    return [replace(each, name=name, latency=None, **identity) for each, name in pairs]


def _inputs(settings: Experiment, variant: Variant) -> dict[str, dict[str, str]]:
    """The fingerprints of what a variant's numbers are of."""
    folder = adapter_of(settings, variant)
    found = {
        "model": fingerprint(formats.resolve(model_of(settings, variant.compression))),
        "adapter": {} if folder is None else contents(folder),
        "text": fingerprint(text_files(settings)["test"]),
    }
    if settings.data is not None and settings.data.second is not None:
        found["second"] = fingerprint(settings.data.second)
    return found


def measurements(settings: Experiment) -> list[Measurement]:
    """Of the reported text, the tasks and the latency; then of the second text."""
    length, windows = settings.windows.length, settings.windows.reported
    found = Measurement(
        tasks=settings.tasks,
        task_data=settings.task_data,
        limit=settings.items,
        perplexity=text_files(settings)["test"],
        latency=settings.latency,
        timing=settings.timing,
        sequence_length=length,
        windows=windows,
    )
    if settings.data is None or settings.data.second is None:
        return [found]
    second = settings.data.second
    return [found, Measurement(perplexity=second, sequence_length=length, windows=windows)]
