"""Products with 2:4 sparse weights, whatever computes them.

A weight is compressed once (`from_dense`, `from_codes`) and multiplied in that form. Invariant:
every backend gives the same product but for rounding, and the same gradient with respect to x.
Weights are frozen: they get no gradient.
"""

import jax
import jax.numpy as jnp

from .. import dispatch
from . import layout, mosaic_gpu, pallas_tpu, reference, xla
from .layout import SparseWeight, to_codes, to_dense

__all__ = ["SparseWeight", "from_codes", "from_dense", "sparse24_matmul", "to_codes", "to_dense"]

_MODULES = {"pallas_tpu": pallas_tpu, "mosaic_gpu": mosaic_gpu, "xla": xla, "reference": reference}


def from_dense(weights: jax.Array, *, backend: str = "auto") -> SparseWeight:
    """Compresses a 2:4 sparse matrix for a backend; can be jitted.

    Args:
        weights: see `layout.from_dense`.
        backend: one of `dispatch.BACKENDS` or "auto", which leaves outputs that are no multiple of
            64 to XLA on a GPU.
    """
    return layout.from_dense(weights, arrangement=_arrangement(backend, weights.shape[1]))


def from_codes(
    words: jax.Array, scales: jax.Array, zeros: jax.Array, *, bits: int, backend: str = "auto"
) -> SparseWeight:
    """Compresses a quantised 2:4 sparse matrix for a backend; can be jitted.

    Args: see `layout.from_codes`; backend is that of `from_dense`.
    """
    arrangement = _arrangement(backend, words.shape[1])
    return layout.from_codes(words, scales, zeros, bits=bits, arrangement=arrangement)


def _arrangement(backend: str, outputs: int) -> str:
    return "rows" if backend == "auto" and outputs % 64 else dispatch.arrangement_of(backend)


def unsupported(weight: SparseWeight, backend: str, dtype: str) -> str | None:
    """Why the kernel "pallas_tpu" or "mosaic_gpu" cannot multiply by a weight, or None if it can.

    Args:
        weight: of which shapes and types are enough.
        backend: whose kernel.
        dtype: of x.
    """
    x = jax.ShapeDtypeStruct((1, weight.inputs), jnp.dtype(dtype))
    return _MODULES[backend].unsupported(x, weight)


def sparse24_matmul(
    x: jax.Array, weight: SparseWeight, *, backend: str = "auto", interpret=False
) -> jax.Array:
    """Multiplies x [..., I] by a 2:4 weight, from the above: see `dispatch.multiply`."""
    return dispatch.multiply(
        "sparse24_matmul", x, weight, _MODULES, backend=backend, interpret=interpret
    )
