"""Walks a model block by block, each block fed with what the compressed ones before it put out.

A block is compressed stage by stage (flow.py); a stage's matrices share one Hessian (matrices.py).
The invariant: nothing falls back in silence. A matrix whose Hessian cannot be factorised, or that
ends worse than plain rounding or magnitude pruning, stops the walk unless it is allowed by name.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from idp_jax.compression.flow import Flow
from idp_jax.compression.matrices import compress_matrices
from idp_jax.compression.rules import allowed_worse, settings_by_name
from idp_jax.config import Compression, ConfigError
from idp_jax.formats.quantization import PACKED_FORMS
from idp_jax.formats.stack import stack
from idp_jax.jobs.machine import release_memory
from idp_jax.models.block import Block, layer_slice
from idp_jax.models.config import ModelConfig
from idp_jax.models.decoder import Decoder
from idp_jax.models.matrices import Matrix, matrices, stages
from idp_jax.models.names import module_names
from idp_jax.models.storage import restore
from idp_jax.weights import Dense, Quantized

# What float32 sums may differ by between two equally good results.
_TOLERANCE = 1e-3
# One part in 256 of the output, squared: what eight bits do not tell apart. A matrix that lies on a
# grid already loses no more, and no better result is asked of it, whatever its baseline loses.
_NOTHING = 2.0**-16


class CompressionError(ValueError):
    """A matrix that could not be compressed: which one, why, and what to try."""


class StageTimes:
    """Seconds spent per kind of work."""

    def __init__(self):
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def measure(self, name: str) -> Iterator[list]:
        """Times a block; arrays put into the list that it yields are waited for."""
        start, results = time.perf_counter(), []
        yield results
        jax.block_until_ready(results)
        self.seconds[name] += time.perf_counter() - start


def compress(
    model: Decoder,
    settings: Compression,
    tokens: np.ndarray | None = None,
    *,
    batch_size: int = 2,
    mesh: jax.sharding.Mesh | None = None,
    progress: Callable = iter,
    times: StageTimes | None = None,
) -> tuple[Decoder, list[dict[str, Any]]]:
    """Compresses every matrix of every block of a model in memory.

    Embeddings, norms and the head stay as they are.

    Args:
        model: with dense matrices.
        settings: method and its numbers.
        tokens: int [samples, T] calibration windows, for methods that need them.
        batch_size: windows that go through the model at a time, on each device that the text is
            cut over.
        mesh: where the calibration text is cut over `data`, the rows of matrices over `model`.
        progress: wraps the iteration over layers.
        times: filled with the seconds of forward, Hessian and core.

    Returns:
        The compressed model, and for each matrix what was done: settings, damping, retries, dead
            columns, relative output error and that of the baseline.

    Raises:
        ConfigError: a group size, pattern or rule that does not fit the model.
        CompressionError: a matrix that is not finite, has no usable Hessian, or ends worse than its
            baseline.
    """
    model = restore(model)
    names = model.layers.weight_names
    packed = [n for n in names if not isinstance(getattr(model.layers, n), Dense)]
    if packed:
        raise ConfigError(f"matrix {packed[0]} is packed already; compress the uncompressed model")
    by_name = resolve_settings(model.config, settings)
    times = StageTimes() if times is None else times
    flow = None
    if needs_data(by_name):
        if tokens is None:
            raise ConfigError(
                f"--method {settings.method} needs calibration text; give --calibration"
            )
        flow = Flow(model, tokens, batch_size, mesh)
    blocks, report = [], []
    for layer in progress(range(model.config.num_layers)):
        block = layer_slice(model.layers, layer)
        block, rows = compress_block(block, layer, by_name, settings, flow, times)
        report.extend(rows)
        blocks.append(jax.tree.map(np.asarray, block))
    return model.with_layers(stack(blocks)), report


def resolve_settings(
    config: ModelConfig, settings: Compression, form: str | None = None
) -> dict[tuple[int, str], Compression | None]:
    """The settings of every matrix, by layer and name, after the rules; None leaves it as it is.

    Args:
        form: one of `formats.quantization.FORMS` that the result is to be stored in; None where it
            stays in memory.

    Raises:
        ConfigError: a rule that matches nothing, or settings that a matrix or the form cannot take.
    """
    modules = module_names(config)
    by_module = settings_by_name(settings, list(modules.values()))
    by_matrix = {matrix.name: matrix for matrix in matrices(config)}
    resolved = {}
    for (layer, name), module in modules.items():
        chosen = by_module[module]
        if chosen is not None:
            _check_fit(module, by_matrix[name], chosen)
            _check_form(module, chosen, form)
        resolved[layer, name] = chosen
    return resolved


def needs_data(by_name: Mapping[Any, Compression | None]) -> bool:
    """Whether any matrix needs calibration text."""
    return any(chosen is not None and chosen.needs_data for chosen in by_name.values())


def _check_fit(module: str, matrix: Matrix, settings: Compression) -> None:
    """Refuses settings that a matrix cannot take, before any work is done."""
    inputs, outputs = matrix.inputs, matrix.outputs
    group = inputs if settings.group_size == -1 else settings.group_size
    if settings.quantizes and inputs % group:
        sizes = [size for size in (32, 64, 128) if inputs % size == 0]
        raise ConfigError(
            f"--group-size {group} does not divide the {inputs} inputs of {module}; "
            f"use {', '.join(map(str, [*sizes, -1]))}, or a rule for this matrix"
        )
    _, run = settings.target().get("pattern", (0, 1))
    if inputs % run or (settings.quantizes and group % run):
        raise ConfigError(
            f"--sparsity {settings.sparsity} needs inputs and groups that are multiples of {run}; "
            f"{module} has {inputs} inputs in groups of {group}"
        )
    if settings.quantizes and (inputs % 32 or outputs % 32):
        raise ConfigError(
            f"{module} of {inputs} x {outputs} cannot be packed: the files need multiples of 32; "
            'give the rule "REGEX skip" for it'
        )


def _check_form(module: str, settings: Compression, form: str | None) -> None:
    """Refuses fewer bits where the file would lose them; packed forms hold dense matrices too."""
    if form is not None and settings.quantizes and form not in PACKED_FORMS:
        raise ConfigError(
            f"{module} gets fewer bits ({settings.method}), which --format {form} cannot store; "
            f"give --method {settings.method} to the run, whose formats hold pruned matrices too, "
            "and prune by --rules"
        )


def compress_block(
    block: Block,
    layer: int,
    by_name: Mapping[tuple[int, str], Compression | None],
    settings: Compression,
    flow: Flow | None,
    times: StageTimes,
) -> tuple[Block, list[dict[str, Any]]]:
    """Compresses one block and moves the flow behind it.

    Args:
        by_name: from `resolve_settings`.
        settings: of the run, for what is allowed.

    Returns:
        The block as it is to be stored, and its rows of the report.

    Raises:
        CompressionError: a matrix that is not finite, has no usable Hessian, or ends worse than its
            baseline.
    """
    stored, rows = {}, []
    modules = module_names(block.config)
    for stage, members in enumerate(stages(block.config)):
        names = tuple(matrix.name for matrix in members)
        chosen = {name: by_name[layer, name] for name in names}
        hessian = None
        if flow is not None:
            with times.measure("forward"):
                flow.enter(stage, block)
        if flow is not None and any(chosen.values()):
            with times.measure("hessian") as done:
                hessian = flow.hessian(stage, block)
                done.append(hessian)
            _check_inputs(hessian, [modules[layer, name] for name in names])
        with times.measure("core") as done:
            weights = {name: getattr(block, name) for name in names}
            for name, weight in weights.items():
                _check_finite(weight, modules[layer, name])
            results = compress_matrices(weights, hessian, chosen)
            done.append(results)
        for name, result in results.items():
            row = {"layer": layer, "matrix": name, "module": modules[layer, name]}
            rows.append(row | _described(chosen[name]) | _numbers(result.row))
            _check(rows[-1], settings)
        stored |= {name: result.weight for name, result in results.items()}
        hessian = results = weights = None
        release_memory()
        if flow is not None:
            block = block.replace(**{name: running(stored[name], flow.dtype) for name in names})
    if flow is not None:
        with times.measure("forward"):
            flow.leave(block)
    return block.replace(**stored), rows


@partial(jax.jit, static_argnames="dtype")
def running(stored: Dense | Quantized, dtype: str) -> Dense:
    """A matrix as the calibration pass runs it.

    It is expanded from what is stored, so that a block read back from disk runs alike.
    """
    return Dense(stored.dense(dtype), None if stored.bias is None else stored.bias[...])


def _described(settings: Compression | None) -> dict[str, Any]:
    if settings is None:
        return {"method": "skip"}
    row: dict[str, Any] = {"method": settings.method}
    if settings.quantizes:
        row |= {"bits": settings.bits, "group_size": settings.group_size}
    return row


def _numbers(row: dict[str, Any]) -> dict[str, Any]:
    """Device scalars as numbers."""
    numbers = {}
    for key, value in row.items():
        number = value.item()
        numbers[key] = number if isinstance(number, int) else float(f"{number:.6g}")
    return numbers


def _check_finite(weight: Dense, module: str) -> None:
    """Refuses numbers that rounding and pruning would turn into ordinary ones."""
    wrong = weight.kernel.size - int(jnp.count_nonzero(jnp.isfinite(weight.kernel[...])))
    if wrong:
        raise CompressionError(
            f"{module} holds {wrong} of {weight.kernel.size} numbers that are not finite (NaN or "
            "infinity); give a model whose training did not diverge, or fetch it again"
        )


def _check_inputs(hessian: jax.Array, names: list[str]) -> None:
    """Refuses a text whose activations are no numbers, or too large for the squares of float32."""
    squares = jnp.diagonal(hessian)  # where every input that is wrong shows
    wrong = squares.size - int(jnp.count_nonzero(jnp.isfinite(squares)))
    if wrong:
        raise CompressionError(
            f"the calibration text gives {' and '.join(names)} {wrong} of {squares.size} inputs "
            "that are not finite or too large to be squared; if the model answers as it should in "
            "--dtype float32, compress it so, otherwise fetch it again"
        )


def _check(row: dict[str, Any], settings: Compression) -> None:
    """Refuses a matrix whose Hessian could not be factorised, or that is worse than it need be."""
    module, error = row["module"], row.get("relative_error", 0.0)
    if not np.isfinite(row.get("damping", 0.0)):
        raise CompressionError(
            f"the Hessian of {module} is not positive definite at any damping tried; give more "
            "calibration text or a larger --damping"
        )
    if not np.isfinite(error):
        raise CompressionError(
            f"the output error of {module} is no number: its weights, or what they are multiplied "
            "by, are too large to be squared in float32; fetch the model again, or leave the "
            f"matrix as it is with --rules '{module} skip'"
        )
    baseline = row.get("baseline_error", np.inf)
    if error > max(baseline * (1 + _TOLERANCE), _NOTHING) and not allowed_worse(settings, module):
        kind = "rounding to nearest" if "bits" in row else "magnitude pruning"
        raise CompressionError(
            f"{module} ends with a relative output error of {error:g}, {kind} alone with "
            f"{baseline:g}; give more calibration text or a larger --damping, or allow it with "
            f"--allow-worse '{module}'"
        )
