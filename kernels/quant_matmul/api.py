"""Products with packed weights, whatever computes them.

A weight is brought into the kernels' layout once, when it is loaded (`prepare`), and multiplied
from there; `layout.restore` brings it back. Invariant: every backend gives the same product but for
rounding, and the same gradient with respect to x. Weights are frozen: they get no gradient.
"""

import jax

from .. import dispatch
from . import mosaic_gpu, pallas_tpu, reference, xla
from .layout import KernelWeight, repack, restore

__all__ = ["KernelWeight", "prepare", "quant_matmul", "restore"]

_MODULES = {"pallas_tpu": pallas_tpu, "mosaic_gpu": mosaic_gpu, "xla": xla, "reference": reference}


def prepare(
    words: jax.Array,
    scales: jax.Array,
    zeros: jax.Array,
    *,
    bits: int,
    group_index: jax.Array | None = None,
    backend: str = "auto",
) -> KernelWeight:
    """Brings a weight from the checkpoint's layout into that of a backend; can be jitted.

    Args: see `layout.repack`; backend is one of `dispatch.BACKENDS` or "auto".
    """
    arrangement = dispatch.arrangement_of(backend)
    return repack(words, scales, zeros, bits=bits, group_index=group_index, arrangement=arrangement)


def quant_matmul(
    x: jax.Array, weight: KernelWeight, *, backend: str = "auto", interpret=False
) -> jax.Array:
    """Multiplies x [..., I] by a packed weight, from `prepare`: see `dispatch.multiply`."""
    return dispatch.multiply(
        "quant_matmul", x, weight, _MODULES, backend=backend, interpret=interpret
    )
