"""Products with compressed weights: which backend serves, the one asked for or the best that can,
and the shapes around it.

Invariant: a backend asked for by name serves or fails with the reason; only "auto" falls back, and
says so once per operation and reason.
"""

import logging
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Protocol

import jax
import jax.numpy as jnp
from jax.core import Tracer

_logger = logging.getLogger(__name__)
_told: set[tuple[str, str, str]] = set()

BACKENDS = ("pallas_tpu", "mosaic_gpu", "xla", "reference")


class Weight(Protocol):
    """What every compressed weight has; one that reorders its inputs has `order` too, int32 [I]."""

    @property
    def inputs(self) -> int:
        """I."""
        ...

    @property
    def outputs(self) -> int:
        """O."""
        ...


def multiply(
    operation: str,
    x: jax.Array,
    weight: Weight,
    modules: Mapping[str, ModuleType],
    *,
    backend: str,
    interpret,
) -> jax.Array:
    """Multiplies by a compressed weight with the backend asked for, or the best that can serve.

    Args:
        operation: its name, which is also that of the product in all modules but `xla`, where it is
            `multiply`. A reference takes x as the caller has it, the others rows in the order of
            the weight.
        x: bfloat16 or float32 [..., I].
        weight: what the modules multiply by.
        modules: one for each of BACKENDS; those of kernels say in `unsupported(x, weight)` why they
            cannot serve.
        backend: "auto" or one of BACKENDS.
        interpret: run the TPU kernel on the CPU; for tests.

    Returns:
        [..., O] of x's dtype.

    Raises:
        ValueError: x of another width, an unknown backend, or a named one that cannot serve.
    """
    if x.shape[-1] != weight.inputs:
        raise ValueError(f"x has {x.shape[-1]} features, the weight has {weight.inputs} inputs")
    reasons = {
        "pallas_tpu": lambda: (
            tpu_missing(interpret) or modules["pallas_tpu"].unsupported(x, weight)
        ),
        "mosaic_gpu": lambda: hopper_missing() or modules["mosaic_gpu"].unsupported(x, weight),
        "xla": lambda: None,
        "reference": lambda: traced_reason(x, weight),
    }
    chosen = choose(operation, backend, reasons, best_backend())
    if chosen == "reference":
        return jnp.asarray(getattr(modules[chosen], operation)(x, weight), x.dtype)
    rows = x.reshape(-1, x.shape[-1])
    order = getattr(weight, "order", None)
    if order is not None:
        rows = rows[:, order]
    if rows.shape[0] == 0 or chosen == "xla":
        y = modules["xla"].multiply(rows, weight)
    else:
        options = {"interpret": interpret} if chosen == "pallas_tpu" else {}
        y = getattr(modules[chosen], operation)(rows, weight, **options)
    return y.reshape(*x.shape[:-1], weight.outputs)


def choose(
    operation: str, backend: str, reasons: Mapping[str, Callable[[], str | None]], default: str
) -> str:
    """Picks a backend.

    Args:
        operation: its name, for messages.
        backend: one of BACKENDS, or "auto".
        reasons: for every backend, what says why it cannot serve, or None.
        default: what "auto" would like to use.

    Raises:
        ValueError: an unknown backend, or one that cannot serve.
    """
    if backend == "auto":
        reason = reasons[default]()
        if reason is None:
            return default
        if (operation, default, reason) not in _told:
            _told.add((operation, default, reason))
            _logger.warning("%s: %s cannot serve (%s); using xla", operation, default, reason)
        return "xla"
    if backend not in reasons:
        raise ValueError(f"backend must be auto or one of {', '.join(reasons)}, not {backend}")
    reason = reasons[backend]()
    if reason is not None:
        raise ValueError(f"{operation}: backend {backend} cannot serve: {reason}")
    return backend


def best_backend() -> str:
    """The fastest backend of the machine, were every shape supported."""
    return {"tpu": "pallas_tpu", "gpu": "mosaic_gpu", "cuda": "mosaic_gpu"}.get(
        jax.default_backend(), "xla"
    )


def tpu_missing(interpret) -> str | None:
    """Why a TPU kernel cannot run here, or None."""
    if interpret or jax.default_backend() == "tpu":
        return None
    return f"it needs a TPU, this process computes on {jax.default_backend()}"


def hopper_missing() -> str | None:
    """Why a Mosaic GPU kernel cannot run here, or None."""
    if jax.default_backend() != "gpu":
        return f"it needs a GPU, this process computes on {jax.default_backend()}"
    capability = getattr(jax.devices()[0], "compute_capability", "unknown")
    if capability != "9.0":
        return f"it needs a Hopper GPU (compute capability 9.0), this one has {capability}"
    return None


def traced_reason(x: jax.Array, weight: Weight) -> str | None:
    """Why the reference cannot run on these arrays, or None."""
    if any(isinstance(array, Tracer) for array in jax.tree.leaves((x, weight))):
        return "it works on concrete arrays, outside jit and grad"
    return None
