"""What a number was measured on: device, versions and cores, kept beside every result."""

import ctypes
import os
import platform
import resource
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import jax

_PACKAGES = (
    "idp-jax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "transformers",
    "lm-eval",
)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def describe() -> dict[str, Any]:
    """Device kind and count, CPU cores, Python and package versions."""
    devices = jax.devices()
    return {
        "device": devices[0].device_kind,
        "platform": devices[0].platform,
        "device_count": len(devices),
        "cpu_cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        **{package: _version(package) for package in _PACKAGES},
    }


def peak_memory() -> dict[str, int]:
    """Bytes that this process has held at most: `host`, and `device` where the device counts."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    device = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return peak if device is None else {**peak, "device": device}


def available_memory() -> int | None:
    """Bytes of host memory that can be had without swapping, where the system says (Linux)."""
    try:
        with open("/proc/meminfo") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return None


def shares_host() -> bool:
    """Whether the devices are the host itself, and their memory its own."""
    return jax.local_devices()[0].platform == "cpu"


def free_memory() -> int | None:
    """Bytes that the first device can still take, where that is known; on a CPU the host's."""
    if shares_host():
        return available_memory()
    stats = jax.local_devices()[0].memory_stats() or {}
    limit = stats.get("bytes_limit")
    return None if limit is None else limit - stats.get("bytes_in_use", 0)


def release_memory() -> None:
    """Gives freed host memory back to the system, where the C library would keep it (glibc).

    A long job of arrays of many sizes would end with the sum of what each size ever took.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
