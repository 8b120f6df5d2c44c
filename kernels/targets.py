"""Devices that are not here, for programs that are compiled for them.

The compilers need no device: libtpu brings the one for TPUs, jax's CUDA plugin the one for GPUs.
A process that opens such devices keeps no compiled programs from then on.
"""

import importlib.util
import math
import os
from collections.abc import Sequence
from typing import Any

# What libtpu would ask the cloud's metadata server, and complain about, without a TPU; and that
# several processes may compile at once, because none of them holds one.
_NO_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
# What XLA's compiler asks of an H100; the fields are those of openxla/xla's device descriptions.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84942979072 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def tpus(kind: str, shape: Sequence[int]) -> list[Any]:
    """TPUs of a kind ("v4", "v5e", "v5p", "v6e") in a torus of two axes, or three of v4 and v5p.

    Raises:
        ImportError: libtpu is missing.
        Exception: whatever it says of a shape that is none.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ImportError("the TPU compiler is missing; pip install libtpu")
    _keep_no_programs()
    for name, value in _NO_TPU.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    name = f"{kind}:{'x'.join(map(str, shape))}"
    # The two cores of a v4 are one device where programs run, and two by the compiler's default.
    options: dict[str, Any] = {"chip_config_name": "megacore"} if kind == "v4" else {}
    if math.prod(shape) == 1:  # hosts have four, unless they are said to have one
        options["chips_per_host_bounds"] = (1, 1, 1)
    return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices)


def h100s(hosts: int, each: int) -> list[Any]:
    """H100s of so many hosts with so many each.

    Raises:
        ImportError: jax's CUDA plugin is missing.
    """
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        raise ImportError(
            "the CUDA compiler is missing; pip install --no-deps jax-cuda13-pjrt jax-cuda13-plugin "
            "of jax's version"
        )
    _keep_no_programs()
    from jax.experimental import topologies

    return list(
        topologies.get_topology_desc(
            platform="cuda",
            topology_name="h100",
            topology=f"1x{hosts}x{each}",
            target_config=_H100,
        ).devices
    )


def _keep_no_programs() -> None:
    """Turns JAX's cache of compiled programs off: without a device they cannot be read back."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
