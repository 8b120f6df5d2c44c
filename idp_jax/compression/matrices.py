"""Compresses the matrices of one stage, which read the same input and share its Hessian.

Every result is held against the baseline of its kind, with the same bits, groups and zeros: plain
rounding for fewer bits, magnitude pruning for zeros. The invariant: what is returned is what is
stored, and its error is measured on that.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from idp_jax.compression.cores.gptq import gptq
from idp_jax.compression.cores.grid import QuantizedMatrix, dequantize_matrix
from idp_jax.compression.cores.hessian import Diagnostics, relative_output_error
from idp_jax.compression.cores.magnitude import magnitude
from idp_jax.compression.cores.rtn import rtn
from idp_jax.compression.cores.sparsegpt import sparsegpt
from idp_jax.compression.cores.wanda import wanda
from idp_jax.config import Compression
from idp_jax.kernels.packing import pack
from idp_jax.sharding import constrain
from idp_jax.weights import Dense, Quantized


class Result(NamedTuple):
    """A compressed matrix and its row of the report (numbers still on the device)."""

    weight: Dense | Quantized
    row: dict[str, Any]


class _Matrix(NamedTuple):
    """Weights [O, I], their codes where there are some, and what the core says of them."""

    dense: jax.Array
    quantized: QuantizedMatrix | None
    diagnostics: Diagnostics | None


def compress_matrices(
    weights: dict[str, Dense],
    hessian: jax.Array | None,
    settings: dict[str, Compression | None],
) -> dict[str, Result]:
    """Compresses matrices that share a Hessian.

    Args:
        weights: kernels [I, O] by name.
        hessian: float32 [I, I], or None for methods without calibration text.
        settings: of each matrix; None leaves it as it is.

    Returns:
        By name, in the order of `weights`. The rows of the report hold `relative_error` and
        `baseline_error` where there is a Hessian, and `damping`, `retries`, `dead_columns` where it
        was factorised.
    """
    out = {name: Result(weight, {}) for name, weight in weights.items()}
    alike: dict[Compression, list[str]] = {}
    for name in weights:
        shared = settings[name]
        if shared is not None:
            alike.setdefault(shared, []).append(name)
    for shared, names in alike.items():
        # Rows are independent and the factor of H serves them all, but an unstructured threshold
        # belongs to one matrix.
        parts = [[name] for name in names] if shared.prunes else [names]
        for part in parts:
            out.update(_compress_alike({name: weights[name] for name in part}, hessian, shared))
    return out


@partial(jax.jit, static_argnames="settings")
def _compress_alike(
    weights: dict[str, Dense], hessian: jax.Array | None, settings: Compression
) -> dict[str, Result]:
    """One program for a stage: what is computed for its matrices, packing and errors included."""
    matrices = {n: weight.kernel[...].astype(jnp.float32).T for n, weight in weights.items()}
    stacked = constrain(jnp.concatenate(list(matrices.values())), "rows", None)
    compressed = _core(stacked, hessian, settings)
    results, first = {}, 0
    for name, weight in weights.items():
        rows = slice(first, first + matrices[name].shape[0])
        first = rows.stop
        quantized = compressed.quantized
        codes = None if quantized is None else QuantizedMatrix(*(x[rows] for x in quantized))
        dense = compressed.dense[rows].astype(weight.kernel[...].dtype)
        row = _row(compressed.diagnostics)
        if settings.prunes:
            row["sparsity"] = jnp.mean(compressed.dense[rows] == 0, dtype=jnp.float32)
        if hessian is not None:
            exact = dense.astype(jnp.float32) if codes is None else compressed.dense[rows]
            row |= _errors(matrices[name], exact, hessian, settings)
        bias = None if weight.bias is None else weight.bias[...]
        stored = Dense(dense.T, bias) if codes is None else _packed(codes, settings.bits, bias)
        results[name] = Result(stored, row)
    return results


def _core(matrix: jax.Array, hessian: jax.Array | None, settings: Compression) -> _Matrix:
    """Runs the method on one [O, I] matrix."""
    method, target = settings.method, settings.target()
    walk = {"damping": settings.damping, "block_size": settings.columns}
    if method == "gptq":
        assert hessian is not None
        order = {"act_order": settings.act_order}
        quantized, dense, diagnostics = gptq(
            matrix, hessian, **_grid(settings), **order, **target, **walk
        )
        return _Matrix(dense, quantized, diagnostics)
    if method == "sparsegpt":
        assert hessian is not None
        dense, _, diagnostics = sparsegpt(matrix, hessian, **target, **walk)
        return _Matrix(dense, None, diagnostics)
    if method == "wanda":
        assert hessian is not None
        return _Matrix(wanda(matrix, hessian, **target)[0], None, None)
    return _baseline(matrix, settings)


def _baseline(matrix: jax.Array, settings: Compression) -> _Matrix:
    """Rounding, magnitude pruning, or both: what needs no text."""
    mask = None
    if settings.prunes:
        matrix, mask = magnitude(matrix, **settings.target())
    if not settings.quantizes:
        return _Matrix(matrix, None, None)
    quantized = rtn(matrix, **_grid(settings), mask=mask)
    return _Matrix(dequantize_matrix(quantized), quantized, None)


def _grid(settings: Compression) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in ("bits", "group_size", "symmetric", "grid")}


def _errors(matrix, compressed, hessian, settings: Compression) -> dict[str, jax.Array]:
    errors = {"relative_error": relative_output_error(matrix, compressed, hessian)}
    if settings.needs_data:
        baseline = _baseline(matrix, settings).dense
        errors["baseline_error"] = relative_output_error(matrix, baseline, hessian)
    return errors


def _packed(matrix: QuantizedMatrix, bits: int, bias) -> Quantized:
    words = pack(matrix.codes.T, bits, axis=0)
    return Quantized(
        words, matrix.scales.T.astype(jnp.float16), matrix.zeros.T, bits=bits, bias=bias
    )


def _row(diagnostics: Diagnostics | None) -> dict[str, Any]:
    if diagnostics is None:
        return {}
    return {
        "damping": diagnostics.damping_used,
        "retries": diagnostics.retries,
        "dead_columns": diagnostics.dead_columns,
    }
