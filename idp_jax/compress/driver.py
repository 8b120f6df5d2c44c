"""Walks a model block by block, each block fed with what the compressed ones before it put out.

One staged pass per block: the matrices of a stage (q, k, v | o | gate, up | down) read the same
input, so they share one Hessian; once a
stage is compressed, the next one's inputs are computed with it. A block therefore costs one forward
pass, and every
Hessian is measured on what the matrix will really see.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from idp_jax.compress.gptq import gptq
from idp_jax.compress.grid import QuantizedMatrix, dequantize_matrix
from idp_jax.compress.hessian import accumulate, empty_state, relative_output_error
from idp_jax.compress.magnitude import magnitude
from idp_jax.compress.rtn import rtn
from idp_jax.compress.sparsegpt import sparsegpt
from idp_jax.config import Compression, ConfigError
from idp_jax.kernels.quant_matmul.packing import pack
from idp_jax.models.block import STAGES, Block, layer_slice, stack_layers
from idp_jax.models.decoder import Decoder
from idp_jax.sharding import shard_batch
from idp_jax.weights import Dense, Quantized


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


@dataclass
class _Flow:
    """The calibration text on its way through the model, in micro-batches: residual streams and
    contexts.
    """

    streams: list[jax.Array]
    contexts: list[Any]


def compress(
    model: Decoder,
    settings: Compression,
    tokens: np.ndarray | None = None,
    *,
    batch_size: int = 8,
    mesh: jax.sharding.Mesh | None = None,
    progress: Callable = iter,
    times: StageTimes | None = None,
) -> tuple[Decoder, list[dict[str, Any]]]:
    """Compresses every matrix of every block; embeddings, norms and the head stay as they are.

    Args:
        model: with dense matrices.
        settings: method and its numbers.
        tokens: int [samples, T] calibration windows, for gptq and sparsegpt.
        batch_size: windows that go through the model at a time.
        mesh: where the calibration text is cut over `data`.
        progress: wraps the iteration over layers.
        times: filled with the seconds of forward, Hessian and core.

    Returns:
        The compressed model, and for each matrix what was done: damping, retries, dead columns,
            relative output error.

    Raises:
        ConfigError: a group size or pattern that does not fit a matrix.
        CompressionError: a matrix without a usable Hessian.
    """
    check_fit(model, settings)
    times = StageTimes() if times is None else times
    if settings.needs_data and tokens is None:
        raise ConfigError(f"--method {settings.method} needs calibration text; give --calibration")
    flow = None
    if tokens is not None and settings.needs_data:
        flow = _start(model, tokens, batch_size, mesh)
    blocks, report = [], []
    for layer in progress(range(model.config.num_layers)):
        block = layer_slice(model.layers, layer)
        block, rows = _compress_block(block, settings, flow, times)
        for row in rows:
            report.append({"layer": layer, **row})
            _check(report[-1])
        blocks.append(jax.tree.map(np.asarray, block))
    return model.with_layers(stack_layers(blocks)), report


def check_fit(model: Decoder, settings: Compression) -> None:
    """Refuses settings that some matrix of the model cannot take, before any work is done.

    Raises:
        ConfigError: naming the matrix.
    """
    for name in model.layers.weight_names:
        weight = getattr(model.layers, name)
        if not isinstance(weight, Dense):
            raise ConfigError(f"matrix {name} is packed already; compress the uncompressed model")
        inputs, outputs = weight.kernel[...].shape[-2:]
        if settings.prunes:
            _, run = settings.target().get("pattern", (0, 1))
            if inputs % run:
                raise ConfigError(
                    f"--sparsity {settings.sparsity} needs multiples of {run}; {name} has "
                    f"{inputs} inputs"
                )
            continue
        if settings.group_size != -1 and inputs % settings.group_size:
            sizes = [size for size in (32, 64, 128) if inputs % size == 0]
            raise ConfigError(
                f"--group-size {settings.group_size} does not divide the {inputs} inputs of "
                f"matrix {name}; "
                f"use {', '.join(map(str, [*sizes, -1]))}"
            )
        if inputs % 32 or outputs % 32:
            raise ConfigError(
                f"matrix {name} of {inputs} x {outputs} cannot be packed: GPTQ files need "
                "multiples of 32"
            )


def _start(model: Decoder, tokens: np.ndarray, batch_size: int, mesh) -> _Flow:
    streams, contexts = [], []
    begin = jax.jit(lambda model, ids: model.start(model.embed(ids))[:2])
    for first in range(0, len(tokens), batch_size):
        ids = shard_batch(np.asarray(tokens[first : first + batch_size], np.int32), mesh)
        h, context = begin(model, ids)
        streams.append(h)
        contexts.append(context)
    return _Flow(streams, contexts)


def _compress_block(
    block: Block, settings: Compression, flow: _Flow | None, times: StageTimes
) -> tuple[Block, list[dict[str, Any]]]:
    """Compresses one block and moves the flow behind it."""
    stored, rows, kept = {}, [], None
    for stage, names in enumerate(STAGES):
        names = tuple(name for name in names if getattr(block, name) is not None)
        inputs = None
        if flow is not None:
            with times.measure("forward") as done:
                kept, inputs = _stage_inputs(stage, block, flow, kept)
                done.append(inputs)
        with times.measure("hessian") as done:
            hessian = None if inputs is None else _hessian(inputs)
            done.append(hessian)
        with times.measure("core") as done:
            for name, result in _compress_stage(block, names, hessian, settings).items():
                running, stored[name], row = result
                block = block.replace(**{name: running})
                rows.append({"matrix": name, **row})
            done.append(stored)
    if flow is not None:
        with times.measure("forward") as done:
            flow.streams = [
                _output(block, h, m) for h, m in zip(flow.streams, kept or [], strict=True)
            ]
            done.append(flow.streams)
    return block.replace(**stored), rows


@jax.jit
def _attention_inputs(block: Block, h):
    return block.attention_input(h)


@jax.jit
def _attention_outputs(block: Block, x, context):
    return block.attention_output(x, context)[0]


@jax.jit
def _mlp_inputs(block: Block, h, attended):
    return block.mlp_input(h, attended)


@jax.jit
def _mlp_hidden(block: Block, x):
    return block.mlp_hidden(x)


@jax.jit
def _output(block: Block, h, hidden):
    return block.output(h, hidden)


def _stage_inputs(stage: int, block: Block, flow: _Flow, kept: list | None):
    """What the matrices of a stage read, per micro-batch; returned twice, as `kept` for the stage
    after it.
    """
    if stage == 0:
        inputs = [_attention_inputs(block, h) for h in flow.streams]
    elif stage == 1:
        pairs = zip(kept or [], flow.contexts, strict=True)
        inputs = [_attention_outputs(block, x, context) for x, context in pairs]
    elif stage == 2:
        pairs = zip(flow.streams, kept or [], strict=True)
        both = [_mlp_inputs(block, h, attended) for h, attended in pairs]
        flow.streams = [h for h, _ in both]
        inputs = [x for _, x in both]
    else:
        inputs = [_mlp_hidden(block, x) for x in kept or []]
    return inputs, inputs


@jax.jit
def _accumulate(state, x):
    return accumulate(state, x.reshape(-1, x.shape[-1]))


def _hessian(inputs: list[jax.Array]) -> jax.Array:
    state = empty_state(inputs[0].shape[-1])
    for x in inputs:
        state = _accumulate(state, x)
    return state.hessian


def _compress_stage(block: Block, names: tuple[str, ...], hessian, settings: Compression):
    """name -> (the weight to run on, the weight to store, the report's row)."""
    kernels = {name: getattr(block, name).kernel[...] for name in names}
    biases = {name: getattr(block, name).bias for name in names}
    matrices = {name: kernel.astype(jnp.float32).T for name, kernel in kernels.items()}
    core = _prune if settings.prunes else _quantize
    results = core(matrices, hessian, settings)
    out = {}
    for name, (dense, matrix, row) in results.items():
        bias = None if biases[name] is None else biases[name][...]
        running = Dense(dense.T.astype(kernels[name].dtype), bias)
        packed = running if matrix is None else _packed(matrix, settings.bits, bias)
        if hessian is not None:
            row["relative_error"] = _relative_error(matrices[name], dense, hessian)
        out[name] = (running, packed, row)
    return out


_relative_error = jax.jit(relative_output_error)


@partial(jax.jit, static_argnames="bits")
def _packed(matrix: QuantizedMatrix, bits: int, bias) -> Quantized:
    words = pack(matrix.codes.T, bits, axis=0)
    return Quantized(
        words, matrix.scales.T.astype(jnp.float16), matrix.zeros.T, bits=bits, bias=bias
    )


def _quantize(matrices, hessian, settings: Compression):
    """All matrices of a stage in one call: rows are independent, and the factor of H serves them
    all.
    """
    stacked = jnp.concatenate(list(matrices.values()), 0)
    grid = {
        "bits": settings.bits,
        "group_size": settings.group_size,
        "symmetric": settings.symmetric,
    }
    row: dict[str, Any] = {}
    if settings.method == "rtn":
        quantized = rtn(stacked, **grid)
        dense = dequantize_matrix(quantized)
    else:
        quantized, dense, diagnostics = gptq(
            stacked, hessian, **grid, damping=settings.damping, block_size=settings.columns
        )
        row = _row(diagnostics)
    out, first = {}, 0
    for name, matrix in matrices.items():
        part = slice(first, first + matrix.shape[0])
        out[name] = (dense[part], QuantizedMatrix(*(x[part] for x in quantized)), dict(row))
        first = part.stop
    return out


def _prune(matrices, hessian, settings: Compression):
    """Matrix by matrix: an unstructured threshold belongs to one matrix."""
    out = {}
    for name, matrix in matrices.items():
        if settings.method == "magnitude":
            dense, mask = magnitude(matrix, **settings.target())
            row: dict[str, Any] = {}
        else:
            dense, mask, diagnostics = sparsegpt(
                matrix,
                hessian,
                **settings.target(),
                damping=settings.damping,
                block_size=settings.columns,
            )
            row = _row(diagnostics)
        out[name] = (dense, None, {**row, "sparsity": mask.mean(dtype=jnp.float32)})
    return out


def _row(diagnostics) -> dict[str, Any]:
    return {
        "damping": diagnostics.damping_used,
        "retries": diagnostics.retries,
        "dead_columns": diagnostics.dead_columns,
    }


def _check(row: dict[str, Any]) -> None:
    """Turns a row's device scalars into numbers and refuses a matrix whose Hessian could not be
    factorised.
    """
    for key, value in row.items():
        if isinstance(value, jax.Array):
            number = value.item()
            row[key] = int(number) if isinstance(number, int) else float(f"{number:.6g}")
    if not np.isfinite(row.get("damping", 0.0)) or not np.isfinite(row.get("relative_error", 0.0)):
        raise CompressionError(
            f"the Hessian of layer {row['layer']} matrix {row['matrix']} is not positive definite "
            "at any damping tried; "
            "give more calibration text or a larger --damping"
        )
