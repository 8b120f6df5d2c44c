"""Test-wide settings: eight fake CPU devices, strict dtype promotion, programs compiled once.

Most of the tests' time is compilation. So LLVM optimises little, and programs are kept on disk:
both workers, tests that run other processes and the next run read them there. JAX keys them by
the program, the options and its version.
"""

import ctypes
import gc
import logging
import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(__file__).parents[1] / ".jax_cache")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")


_grown_from = [0]  # bytes of this process when programs were last let go


@pytest.fixture(scope="module", autouse=True)
def _few_programs():
    """Lets go of compiled programs when they have taken 2 GB more.

    JAX keeps every program that it compiled. Over thousands of tests a worker grew to 6 GB, and
    then died inside the compiler now and then. What is let go does not all go back to the system,
    so growth counts; to clear after every module would read much again.
    """
    yield
    if resident_memory() > _grown_from[0] + 2e9:
        jax.clear_caches()
        gc.collect()
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc alone has it
        if trim is not None:
            trim(0)
        _grown_from[0] = resident_memory()


def resident_memory() -> int:
    """Bytes of this process in memory, 0 where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def no_logs():
    """Nothing is logged: workers cannot tell each other of text with half a character."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture
def optimised():
    """Programs are optimised, for tests of real models, where running takes longer than that."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="module")
def optax_promotes():
    """optax raises floats to int32 powers; our own code is traced strictly in the tests of it."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def store(tmp_path, monkeypatch):
    """An empty object store in memory, and an empty cache of what is copied from it."""
    import fsspec

    from tests.helpers import another_machine

    another_machine(monkeypatch, tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    system = fsspec.filesystem("memory")
    system.store.clear()
    system.pseudo_dirs[:] = [""]
    return system
