"""`idp-jax eval`: a model is loaded once and measured with every selector that is asked for."""

from contextlib import ExitStack, nullcontext
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from idp_jax import formats
from idp_jax.config import ConfigError, Evaluate, Measurement
from idp_jax.config.choices import Role
from idp_jax.config.files import to_dict
from idp_jax.data.text import read_text
from idp_jax.evaluation.latency import latency
from idp_jax.evaluation.perplexity import perplexity, windows_from_text
from idp_jax.evaluation.results import (
    Results,
    TaskScores,
    VariantResult,
    is_results,
    write,
)
from idp_jax.formats.adapters import read_adapter
from idp_jax.jobs.folder import check_writable
from idp_jax.jobs.lock import locked
from idp_jax.jobs.machine import describe
from idp_jax.jobs.progress import SILENT, Progress
from idp_jax.processes import first_process, mesh_of
from idp_jax.recover import Repaired
from idp_jax.recover.methods import parameter_count
from idp_jax.recover.selection import find_selector
from idp_jax.sharding import shard


def score(settings: Evaluate, *, progress: Progress = SILENT) -> Results:
    """Scores a model as the settings ask, and writes the results.

    Raises:
        ConfigError: settings that do not fit the model or its adapter.
        ValueError: the model, the adapter, a task or the text cannot be used.
    """
    for name in settings.selector:
        find_selector(name)
    mesh = mesh_of(settings.mesh)
    with ExitStack() as held, jax.set_mesh(mesh) if mesh is not None else nullcontext():

        def begin() -> None:
            check_writable(settings.out)
            held.enter_context(locked(settings.out))
            _check_replaceable(settings)

        first_process(begin, "results: begin")
        variants = _variants(settings, mesh, progress)
        results = Results(config=to_dict(settings), environment=describe(), variants=variants)
        first_process(lambda: write(results, settings.out), "results")
    return results


def _check_replaceable(settings: Evaluate) -> None:
    """Refuses a place for results where something stands that they must not replace."""
    out = settings.out
    if out.is_dir():
        raise ConfigError(f"--out {out} is a folder; give a file such as results.json")
    if out.is_symlink():
        raise ConfigError(f"--out {out} is a link; give the file that it stands for")
    if not out.exists():
        return
    if not settings.overwrite:
        raise ConfigError(f"{out} exists; give another --out, or --overwrite")
    if not is_results(out):
        raise ConfigError(f"{out} holds no results, so it is not replaced; give another --out")


def _variants(
    settings: Evaluate, mesh: jax.sharding.Mesh | None, progress: Progress
) -> list[VariantResult]:
    """One variant for each selector, or the one that the model and its adapter are."""
    model = formats.load_model(
        settings.model, **settings.held, mesh=mesh, progress=progress.tracker("loading")
    )
    tokenizer = formats.load_tokenizer(settings.model)
    repaired, name = Repaired.of(model), settings.model
    identity: dict[str, Any] = {"model": settings.model, "role": _role(settings)}
    if settings.adapter is not None:
        adapter = shard(read_adapter(model, settings.adapter), mesh)
        repaired, name = adapter.repair(model), f"{settings.model} + {settings.adapter}"
        identity["adapter"] = str(settings.adapter)
        identity["extra_parameters"] = parameter_count(adapter)
    if not settings.selector:
        return [measure(repaired, tokenizer, settings, name=name, progress=progress, **identity)]
    if len(prompt_lengths(repaired)) < 2:
        raise ConfigError(
            f"--selector {settings.selector[0]} chooses among the prompts of a pool, which "
            f"{settings.adapter} is not"
        )
    return [
        measure(
            repaired.with_selector(chosen),
            tokenizer,
            settings,
            name=f"{name}, {chosen}",
            selector=chosen,
            progress=progress,
            **identity,
        )
        for chosen in settings.selector
    ]


def measure(
    repaired: Repaired,
    tokenizer: Any,
    settings: Measurement,
    *,
    progress: Progress = SILENT,
    **identity: Any,
) -> VariantResult:
    """Measures one variant.

    Args:
        tokenizer: a transformers tokenizer.
        identity: what `VariantResult` says of it: name, role, model and the rest.

    Raises:
        ValueError: a task or the text cannot be used.
    """
    text, scores, times = None, TaskScores(), None
    if settings.perplexity is not None:
        windows = windows_from_text(
            tokenizer, read_text(settings.perplexity), settings.sequence_length, settings.windows
        )
        track = progress.tracker("perplexity")
        found = perplexity(repaired, windows, settings.batch_size, progress=track)
        text = replace(found, file=str(settings.perplexity))
    if settings.task_names:
        from idp_jax.evaluation.harness_tasks import evaluate  # imports the harness, some seconds

        scores = evaluate(
            repaired,
            tokenizer,
            tasks=settings.task_names,
            task_data=settings.task_data,
            limit=settings.limit,
            batch_size=settings.batch_size,
            num_fewshot=settings.num_fewshot,
            max_length=settings.max_length,
            seed=settings.seed,
            progress=progress,
        )
    if settings.latency:
        with progress.bar("latency") as update:
            update(0, 1)
            times = latency(repaired, **to_dict(settings.timing))
            update(1, 1)
    return VariantResult(
        **vars(scores),
        perplexity=text,
        latency=times,
        prompt_lengths=prompt_lengths(repaired),
        **identity,
    )


def prompt_lengths(repaired: Repaired) -> list[int]:
    """Tokens of each prompt that may stand in front of the input; none for a bare model."""
    if repaired.prefix is None:
        return []
    return np.asarray(repaired.prefix.mask).sum(-1).tolist()


def _role(settings: Evaluate) -> Role:
    """A model that was compressed says so: it is packed, or has the report of our compression."""
    if settings.adapter is not None:
        return "repaired"
    source = formats.open_source(settings.model)
    compressed = source.quantization is not None
    return "compressed" if compressed or (source.path / "compression.json").is_file() else "dense"
