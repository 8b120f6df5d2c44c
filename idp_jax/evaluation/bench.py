"""`idp-jax bench`: models and their repairs timed in turns, in one process.

A machine that others use, too, is slow for minutes. So a round goes once through every variant and
batch size, in an order drawn anew, and variants are compared by their medians over rounds. A model
that several variants share is loaded once. An adapter is merged into a matrix only where the file
of the model may hold the result: not where it is packed, nor where it is pruned.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from idp_jax import formats
from idp_jax.config import Bench, ConfigError, Lora, Train
from idp_jax.config.choices import Repair
from idp_jax.config.files import to_dict
from idp_jax.evaluation import bench_results
from idp_jax.evaluation.bench_results import (
    FEWER_PARAMETERS,
    SCHEMA,
    BenchResults,
    BenchVariant,
    Equal,
    Timed,
    claims,
)
from idp_jax.evaluation.job import claimed
from idp_jax.evaluation.latency import check_positions
from idp_jax.evaluation.results import is_results
from idp_jax.evaluation.roofline import Peak, bound, kv_bytes, peak_of, weight_bytes
from idp_jax.formats.adapters import read_adapter
from idp_jax.formats.load import dtype_of, hold, storage_of
from idp_jax.formats.source import open_config
from idp_jax.inference.timing import time_tokens
from idp_jax.jobs.machine import describe, shares_host
from idp_jax.jobs.progress import SILENT, Progress
from idp_jax.models.abstract import abstract
from idp_jax.models.config import from_hf
from idp_jax.models.decoder import Decoder
from idp_jax.processes import first_process
from idp_jax.recover import LoraAdapter, NormsAndBiases, Pool, PrefixAdapter, Repaired, SoftPrompt
from idp_jax.recover.merge import merged
from idp_jax.recover.methods import METHODS, Adapter, parameter_count
from idp_jax.recover.starts import Start

_KINDS: dict[type, Repair] = {
    Pool: "idp",
    SoftPrompt: "prompt",
    PrefixAdapter: "prefix",
    LoraAdapter: "lora",
    NormsAndBiases: "norms",
}
_RANKS, _TARGETS = (4, 8, 16, 32, 64), (("q", "v"), ("all",))  # of LoRAs that people train


class _Variant(NamedTuple):
    """One that is to be timed, or that only its shapes are known of."""

    facts: BenchVariant
    repaired: Repaired


def bench(settings: Bench, *, progress: Progress = SILENT) -> BenchResults:
    """Times what the settings ask for, and writes what was found.

    With `plan` nothing is loaded and nothing timed; it is written where a place is given.

    Raises:
        ConfigError: settings that do not fit a model or an adapter.
        ValueError: a model or an adapter cannot be used.
    """
    place = nullcontext()
    if settings.out is not None:
        ours = partial(is_results, schema=SCHEMA)
        place = claimed(settings.out, settings.overwrite, settings.mesh, ours)
    with place:
        left_out, raw = {}, open_config(settings.model)
        planned = [v for model in settings.models for v in _planned(settings, model)]
        _check(settings, planned)
        peak_here = partial(peak_of, settings.chip, _dtype(settings, raw))
        peak, held = peak_here(), planned
        runs: list[dict[int, Timed]] = [{} for _ in planned]
        if not settings.plan:
            held = [
                variant
                for model in settings.models
                for variant in _loaded(settings, model, progress, left_out)
            ]
            runs = _timed(settings, held, progress)
            peak = peak.best(peak_here())
        variants = [
            replace(_counted(variant, settings, peak), runs=found)
            for variant, found in zip(held, runs, strict=True)
        ]
        results = BenchResults(
            config=to_dict(settings),
            environment=describe(),
            peak=peak,
            variants=variants,
            left_out=left_out,
            equal=_equal(settings),
            claims=claims(variants, settings.seed),
        )
        if settings.out is not None:
            out = settings.out
            first_process(lambda: bench_results.write(results, out), "results")
    return results


def _check(settings: Bench, planned: list[_Variant]) -> None:
    """Refuses, before anything is loaded, what could not be told apart or is too long."""
    names = [variant.facts.name for variant in planned]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"two variants are called {name!r}; rename a folder or an adapter")
    for variant in planned:
        check_positions(variant.repaired, settings.prompt_length, settings.new_tokens)


def _dtype(settings: Bench, raw: Any) -> str:
    """What models are held in; by default as the device would whose roofline it is."""
    other = None if settings.chip is None else "bfloat16"
    return dtype_of(raw, settings.dtype or other)


def _name(model: str) -> str:
    """What a model is called in tables: the last part of its place."""
    return Path(model).name


def _planned(settings: Bench, model: str) -> Iterator[_Variant]:
    """A model and its repairs as shapes alone, of its configuration."""
    raw = open_config(model)
    on_cpu = settings.chip is None and shares_host()
    keeps = settings.weights == "packed" or (settings.weights == "auto" and not on_cpu)
    packed = storage_of(raw, keeps)
    decoder = abstract(from_hf(raw), dtype=_dtype(settings, raw), weights=packed)
    yield _variant(_name(model), model, Repaired.of(decoder))
    for name, folder, make in _adapters(settings, model):
        adapter = jax.eval_shape(make, decoder) if folder is None else make(decoder)
        repaired = jax.eval_shape(_repaired, adapter, decoder)
        yield _variant(f"{_name(model)} + {name}", model, repaired, adapter, folder)


def _repaired(adapter: Adapter, decoder: Decoder) -> Repaired:
    return adapter.repair(decoder)


def _loaded(
    settings: Bench, model: str, progress: Progress, left_out: dict[str, str]
) -> Iterator[_Variant]:
    """A model and its repairs; those that cannot be merged are named in `left_out`, with why."""
    stored = formats.load_model(
        model,
        dtype=settings.dtype,
        kernel="xla",
        use_sparse24=False,
        progress=progress.tracker("loading"),
    )
    held = partial(hold, weights=settings.weights, kernel=settings.kernel)
    decoder = held(stored)
    yield _variant(_name(model), model, Repaired.of(decoder))
    for name, folder, make in _adapters(settings, model):
        adapter, whole = make(decoder), f"{_name(model)} + {name}"
        yield _variant(whole, model, adapter.repair(decoder), adapter, folder)
        if not isinstance(adapter, LoraAdapter):
            continue
        try:
            together = held(merged(adapter, stored))
        except ValueError as reason:
            left_out[f"{whole}, merged"] = str(reason)
            continue
        found = _variant(f"{whole}, merged", model, Repaired.of(together), adapter, folder)
        yield found._replace(facts=replace(found.facts, merged=True))


def _adapters(
    settings: Bench, model: str
) -> Iterator[tuple[str, Path | None, Callable[[Decoder], Adapter]]]:
    """Name, folder and maker of every adapter."""
    for name, folder in settings.adapters.items():
        yield name, folder, partial(_read, folder)
    for number, method in enumerate(settings.made):
        key = jax.random.fold_in(jax.random.key(settings.seed), number)
        title = {"idp": "IDP", "lora": "LoRA"}.get(method, method)
        yield title, None, partial(_fresh, settings, model, method, key)


def _read(folder: Path, decoder: Decoder) -> Adapter:
    return read_adapter(decoder, folder)


def _fresh(
    settings: Bench, model: str, method: Repair, key: jax.Array, decoder: Decoder
) -> Adapter:
    """An adapter as `train` would begin it, moved away from there as if it had been trained."""
    train = Train(
        model=model,
        out=Path("unused"),
        method=method,
        prompt_length=settings.soft_prompt_length,
        pool_lengths=settings.pool_lengths,
        lora=settings.lora,
    )
    made = [run.init(decoder, Start(key)) for run in METHODS[method].runs(train)]
    adapter = METHODS[method].combine(train, made, decoder, _no_text)
    # A LoRA begins at zero, and zero may be merged into anything.
    return jax.tree.map(lambda x: x + jnp.asarray(1e-3, x.dtype), adapter)


def _no_text(count: int) -> np.ndarray:
    return np.zeros((0, 1), np.int32)


def _variant(
    name: str,
    model: str,
    repaired: Repaired,
    adapter: Adapter | None = None,
    folder: Path | None = None,
) -> _Variant:
    """What is known of a variant beside its times; shapes are enough."""
    decoder, prefix = repaired.decoder, repaired.prefix
    slots = 0 if prefix is None else prefix.length
    facts = BenchVariant(
        name=name,
        model=model,
        repair=None if adapter is None else _kind(adapter),
        adapter=None if folder is None else str(folder),
        about="" if adapter is None else _about(adapter),
        parameters=0 if adapter is None else parameter_count(adapter),
        weight_bytes=weight_bytes(decoder),
        kv_bytes=slots * kv_bytes(decoder),
        stored_kv_bytes=slots * kv_bytes(decoder) * (0 if prefix is None else prefix.batch),
        bounds={},
    )
    return _Variant(facts, repaired)


def _kind(adapter: Adapter) -> Repair:
    return next(kind for of, kind in _KINDS.items() if isinstance(adapter, of))


def _about(adapter: Adapter) -> str:
    """Lengths of prompts, or ranks and matrices."""
    if isinstance(adapter, Pool):
        return f"{' + '.join(map(str, adapter.lengths))} tokens"
    if isinstance(adapter, SoftPrompt | PrefixAdapter):
        return f"{adapter.length} tokens"
    if isinstance(adapter, LoraAdapter):
        return f"rank {adapter.rank} on {' '.join(name for name, _ in adapter.ranks)}"
    return ""


def _counted(variant: _Variant, settings: Bench, peak: Peak) -> BenchVariant:
    """The facts of a variant with its bounds."""
    sizes = {"prompt_length": settings.prompt_length, "new_tokens": settings.new_tokens}
    of = lambda size: bound(variant.repaired, peak, batch_size=size, **sizes)
    return replace(variant.facts, bounds={size: of(size) for size in settings.batch_sizes})


def _timed(settings: Bench, variants: list[_Variant], progress: Progress) -> list[dict[int, Timed]]:
    """Every variant at every batch size, in turns; in a round all read the same prompts."""
    cells = [(v, size) for v in range(len(variants)) for size in settings.batch_sizes]
    vocabulary = variants[0].repaired.decoder.config.vocab_size
    found: dict[tuple[int, int], list[np.ndarray]] = {cell: [] for cell in cells}
    rounds = settings.warmup + settings.repeats
    with progress.bar("timing", "generations") as update:
        update(0, rounds * len(cells))
        for turn in range(rounds):
            draw = np.random.default_rng((settings.seed, turn))
            shape = (max(settings.batch_sizes), settings.prompt_length)
            ids = draw.integers(0, vocabulary, shape, np.int32)
            for done, place in enumerate(draw.permutation(len(cells)), 1):
                number, size = cells[place]
                repaired = variants[number].repaired
                seconds = time_tokens(repaired, ids[:size], new_tokens=settings.new_tokens)
                if turn >= settings.warmup:
                    found[cells[place]].append(seconds)
                update(turn * len(cells) + done, rounds * len(cells))
    of = lambda number: {n: Timed.of(found[number, n]) for n in settings.batch_sizes}
    return [of(number) for number in range(len(variants))]


def _equal(settings: Bench) -> list[Equal]:
    """LoRAs of several sizes beside the first model, and prompts of 21 times fewer parameters."""
    config = from_hf(open_config(settings.model))
    decoder, found = abstract(config), []
    for targets in _TARGETS:
        for rank in _RANKS:
            sized = replace(settings, lora=Lora(rank=rank, targets=targets))
            make = partial(_fresh, sized, settings.model, "lora", jax.random.key(0))
            parameters = parameter_count(jax.eval_shape(make, decoder))
            tokens = int(parameters / FEWER_PARAMETERS / config.embedding_dim)
            found.append(Equal(rank, list(targets), parameters, tokens))
    return found
