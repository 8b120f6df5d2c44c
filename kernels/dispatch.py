"""Which backend serves a product with a compressed weight, and the shapes around it.

Invariant: a backend asked for by name serves or fails with the reason; only "auto" falls back, and
says so once per operation and reason.
"""

import logging
from collections.abc import Callable, Mapping
from types import ModuleType

import jax
import jax.numpy as jnp
from jax.core import Tracer

from .devices import best_backend, hopper_missing, tpu_missing
from .weight import Weight

_logger = logging.getLogger(__name__)
_told: set[tuple[str, str, str]] = set()

BACKENDS = ("pallas_tpu", "mosaic_gpu", "xla", "reference")


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
        [..., O] of x's dtype, summed in float32.

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
    # A profile shows what ran: "quant_matmul.pallas_tpu", say.
    with jax.named_scope(f"{operation}.{chosen}"):
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


def arrangement_of(backend: str) -> str:
    """The order of words that a backend reads; "auto" is the best that the machine has."""
    backend = best_backend() if backend == "auto" else backend
    return "fragments" if backend == "mosaic_gpu" else "rows"


def unsupported(x: jax.Array, weight: Weight, *, backend: str, span: int) -> str | None:
    """Why the kernel of a backend cannot multiply by a weight, or None if it can.

    Args:
        x: of which the dtype is enough.
        weight: of which shapes and types are enough.
        backend: "pallas_tpu" or "mosaic_gpu".
        span: inputs that the kernel walks at once: groups are of 32, 64 and so on inputs up to
            half of that, or of multiples of it.
    """
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        return f"x is {x.dtype}: bfloat16 and float32 are supported"
    if weight.arrangement != arrangement_of(backend):
        return f"the weight is arranged as {weight.arrangement}: prepare it for {backend}"
    size = weight.inputs // weight.groups
    sizes = [n for n in (32, 64, 128, 256, 512) if n < span]
    if weight.groups > 1 and size not in sizes and size % span:
        return f"group size {size} is not {', '.join(map(str, sizes))} or a multiple of {span}"
    return None


def traced_reason(x: jax.Array, weight: Weight) -> str | None:
    """Why the reference cannot run on these arrays, or None."""
    if any(isinstance(array, Tracer) for array in jax.tree.leaves((x, weight))):
        return "it works on concrete arrays, outside jit and grad"
    return None
