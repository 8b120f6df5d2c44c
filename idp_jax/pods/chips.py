"""Devices by name, and what their vendors say of them.

A topology is a kind and a shape: `v5e:16x16` (TPUs by the torus they stand in) or `h100:4x8` (hosts
times GPUs of a host). The compilers need no device: libtpu brings the one for TPUs, jax's CUDA
plugin the one for GPUs.
"""

import importlib.util
import math
import os
import re
from dataclasses import dataclass
from typing import Any

from idp_jax.config import ConfigError

_GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One device.

    Attributes:
        platform: "tpu" or "gpu".
        memory: bytes that programs may use.
        flops: of bfloat16 products, a second.
        bandwidth: of the memory, bytes a second.
        link: bytes a second that a device sends around a ring of its neighbours; of GPUs within a
            host.
        far: the same between hosts, where that is another network.
    """

    platform: str
    memory: int
    flops: float
    bandwidth: float
    link: float
    far: float | None = None


# Google Cloud's pages on each TPU version, NVIDIA's data sheet of the H100 SXM. Of a TPU's memory
# the compiler leaves programs this much; a ring uses both directions of one axis of the torus.
CHIPS = {
    "v4": Chip("tpu", int(30.75 * _GIB), 275e12, 1228e9, 100e9),
    "v5e": Chip("tpu", int(15.75 * _GIB), 197e12, 819e9, 100e9),
    "v5p": Chip("tpu", int(95.74 * _GIB), 459e12, 2765e9, 200e9),
    "v6e": Chip("tpu", int(31.25 * _GIB), 918e12, 1640e9, 200e9),
    "h100": Chip("gpu", int(79.1 * _GIB), 989e12, 3350e9, 450e9, 50e9),
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


@dataclass(frozen=True)
class Topology:
    """Devices that are not here.

    Attributes:
        name: as it was asked for.
        chip: what each is.
        shape: of the torus; or hosts, and devices of a host.
        devices: what a mesh is made of.
    """

    name: str
    chip: Chip
    shape: tuple[int, ...]
    devices: list[Any]

    def link(self, size: int) -> float:
        """Bytes a second around a ring of so many devices, neighbours as far as they can be."""
        within = self.shape[-1]
        return self.chip.link if self.chip.far is None or size <= within else self.chip.far


def open_topology(name: str) -> Topology:
    """The devices of a name such as "v5e:16x16".

    Raises:
        ConfigError: an unknown kind, a shape that does not exist, or a compiler that is missing.
    """
    kind, _, shape = name.partition(":")
    if kind not in CHIPS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){0,2}", shape):
        raise ConfigError(
            f"--topology {name!r} is no kind and shape of {', '.join(CHIPS)}; give one such as "
            "v5e:16x16, v5p:4x4x4 or h100:8"
        )
    sizes = tuple(int(size) for size in shape.split("x"))
    chip = CHIPS[kind]
    try:
        devices = (_tpus if chip.platform == "tpu" else _gpus)(kind, sizes)
    except ImportError as error:
        raise ConfigError(f"--topology {name}: {error}") from error
    except Exception as error:  # whatever the compiler says of a shape
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(f"--topology {name} is none that the compiler knows: {reason}") from error
    if len(devices) != math.prod(sizes):
        raise ConfigError(f"--topology {name} gives {len(devices)} devices; give another shape")
    return Topology(name, chip, sizes, devices)


def _tpus(kind: str, sizes: tuple[int, ...]) -> list[Any]:
    if importlib.util.find_spec("libtpu") is None:
        raise ImportError("the TPU compiler is missing; pip install libtpu")
    # Without a TPU it would ask the cloud's metadata server what machine this is.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    # Several processes may compile at once: none of them holds a TPU.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    name = f"{kind}:{'x'.join(map(str, sizes))}"
    # The two cores of a v4 are one device where programs run, and two by the compiler's default.
    options = {"chip_config_name": "megacore"} if kind == "v4" else {}
    return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices)


def _gpus(kind: str, sizes: tuple[int, ...]) -> list[Any]:
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        raise ImportError(
            "the CUDA compiler is missing; pip install --no-deps jax-cuda13-pjrt jax-cuda13-plugin "
            "of jax's version"
        )
    from jax.experimental import topologies

    hosts, each = sizes if len(sizes) == 2 else (1, math.prod(sizes))
    return list(
        topologies.get_topology_desc(
            platform="cuda",
            topology_name=kind,
            topology=f"1x{hosts}x{each}",
            target_config=_H100,
        ).devices
    )
