"""Products with packed weights, whatever computes them.

A weight is brought into the kernels' layout once, when it is loaded (`prepare`), and multiplied
from there; `layout.restore` brings it back. Invariant: every backend gives the same product but for
rounding, and the same gradient with respect to x. Weights are frozen: they get no gradient.
"""

import jax
import jax.numpy as jnp

from .. import dispatch
from . import mosaic_gpu, pallas_tpu, reference, xla
from .layout import KernelWeight, repack, restore

__all__ = ["KernelWeight", "prepare", "quant_matmul", "restore"]


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
    backend = dispatch.best_backend() if backend == "auto" else backend
    arrangement = "fragments" if backend == "mosaic_gpu" else "rows"
    return repack(words, scales, zeros, bits=bits, group_index=group_index, arrangement=arrangement)


def quant_matmul(
    x: jax.Array, weight: KernelWeight, *, backend: str = "auto", interpret=False
) -> jax.Array:
    """Multiplies by a packed weight.

    Args:
        x: bfloat16 or float32 [..., I].
        weight: from `prepare`.
        backend: "auto" or one of `dispatch.BACKENDS`.
        interpret: run the TPU kernel on the CPU; for tests.

    Returns:
        [..., O] of x's dtype, summed in float32.

    Raises:
        ValueError: x of another width, an unknown backend, or a named one that cannot serve.
    """
    if x.shape[-1] != weight.inputs:
        raise ValueError(f"x has {x.shape[-1]} features, the weight has {weight.inputs} inputs")
    chosen = dispatch.choose(
        "quant_matmul",
        backend,
        {
            "pallas_tpu": lambda: (
                dispatch.tpu_missing(interpret) or pallas_tpu.unsupported(x, weight)
            ),
            "mosaic_gpu": lambda: dispatch.hopper_missing() or mosaic_gpu.unsupported(x, weight),
            "xla": lambda: None,
            "reference": lambda: dispatch.traced_reason(x, weight.words),
        },
        dispatch.best_backend(),
    )
    if chosen == "reference":
        return jnp.asarray(reference.quant_matmul(x, weight), x.dtype)
    rows = x.reshape(-1, x.shape[-1])
    if weight.order is not None:
        rows = rows[:, weight.order]
    if rows.shape[0] == 0 or chosen == "xla":
        y = xla.multiply(rows, weight)
    elif chosen == "pallas_tpu":
        y = pallas_tpu.quant_matmul(rows, weight, interpret=interpret)
    else:
        y = mosaic_gpu.quant_matmul(rows, weight)
    return y.reshape(*x.shape[:-1], weight.outputs)
