"""What programs are made for, and which kernels that can run.

Inside `jax.set_mesh` it is the mesh's kind of device that is asked, so that a program compiled for
a pod is the pod's, whatever machine compiles it; elsewhere the default device of this process.
"""

import re
from typing import Any

import jax

_HOPPER = re.compile(r"\b(GH200|H100|H200|H800|H20)\b")


def _target() -> Any:
    """A device of the kind that programs are made for: a `jax.Device`, or an abstract one."""
    return getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None) or jax.devices()[0]


def platform() -> str:
    """What programs are made for: "cpu", "gpu" or "tpu"."""
    name = _target().platform
    return "gpu" if name in ("cuda", "rocm") else name


def device_kind() -> str:
    """The kind of device that programs are made for, as tuned.json names it."""
    return _target().device_kind


def best_backend() -> str:
    """The fastest backend of the target, were every shape supported."""
    return {"tpu": "pallas_tpu", "gpu": "mosaic_gpu"}.get(platform(), "xla")


def tpu_missing(interpret) -> str | None:
    """Why a TPU kernel cannot run there, or None."""
    if interpret or platform() == "tpu":
        return None
    return f"it needs a TPU, this process computes on {platform()}"


def hopper_missing() -> str | None:
    """Why a Mosaic GPU kernel cannot run there, or None."""
    if platform() != "gpu":
        return f"it needs a GPU, this process computes on {platform()}"
    capability = getattr(_target(), "compute_capability", None)
    if capability is None:  # of an abstract device nothing but its name is known
        capability = "9.0" if _HOPPER.search(device_kind()) else f"that of {device_kind()}"
    if capability != "9.0":
        return f"it needs a Hopper GPU (compute capability 9.0), this one has {capability}"
    return None
