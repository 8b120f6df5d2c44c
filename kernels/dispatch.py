"""Which backend serves a call: the one asked for, or the best that can.

Invariant: a backend asked for by name serves or fails with the reason; only "auto" falls back, and
says so once per operation and reason.
"""

import logging
from collections.abc import Callable, Mapping

import jax
from jax.core import Tracer

_logger = logging.getLogger(__name__)
_told: set[tuple[str, str, str]] = set()

BACKENDS = ("pallas_tpu", "mosaic_gpu", "xla", "reference")


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


def machine_backend(backend: str) -> str:
    """What serves on this machine, were every shape supported: "pallas_tpu", "mosaic_gpu" or "xla".

    Args:
        backend: one of these, or "auto" for the best that the machine has.

    Raises:
        ValueError: another backend, or one that this machine cannot run.
    """
    reasons = {
        "pallas_tpu": lambda: tpu_missing(False),
        "mosaic_gpu": hopper_missing,
        "xla": lambda: None,
    }
    return choose("packed weights", backend, reasons, best_backend())


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


def traced_reason(*arrays: jax.Array) -> str | None:
    """Why the reference cannot run on these arrays, or None."""
    if any(isinstance(array, Tracer) for array in arrays):
        return "it works on concrete arrays, outside jit and grad"
    return None
