"""What this process computes on, and which kernels that can run."""

import jax


def device_kind() -> str:
    """The kind of the default device, as tuned.json names it."""
    return jax.devices()[0].device_kind


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
