"""Devices by name, and what their vendors say of them.

A topology is a kind and a shape: `v5e:16x16` (TPUs by the torus they stand in) or `h100:4x8`
(hosts times GPUs of a host).
"""

import math
import re
from dataclasses import dataclass
from typing import Any

from idp_jax.config import ConfigError
from idp_jax.kernels.targets import h100s, tpus

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


# Google Cloud's pages on each TPU version, NVIDIA's data sheets of the H100 SXM and the H200. Of a
# TPU's memory the compiler leaves programs this much; a ring uses both directions of one axis of
# the torus.
CHIPS = {
    "v4": Chip("tpu", int(30.75 * _GIB), 275e12, 1228e9, 100e9),
    "v5e": Chip("tpu", int(15.75 * _GIB), 197e12, 819e9, 100e9),
    "v5p": Chip("tpu", int(95.74 * _GIB), 459e12, 2765e9, 200e9),
    "v6e": Chip("tpu", int(31.25 * _GIB), 918e12, 1640e9, 200e9),
    "h100": Chip("gpu", int(79.1 * _GIB), 989e12, 3350e9, 450e9, 50e9),
}
_H200 = Chip("gpu", int(141e9), 989e12, 4800e9, 450e9, 50e9)
# What jax calls them where they are.
_HERE = {
    "TPU v4": CHIPS["v4"],
    "TPU v5 lite": CHIPS["v5e"],
    "TPU v5": CHIPS["v5p"],
    "TPU v6 lite": CHIPS["v6e"],
    "NVIDIA H100 80GB HBM3": CHIPS["h100"],
    "NVIDIA H200": _H200,
}
_EXAMPLES = "v5e:16x16, v5p:4x4x4 or h100:8"
_AXES = {"v4": 3, "v5e": 2, "v5p": 3, "v6e": 2}  # of the torus


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


def chip_here(device_kind: str) -> Chip | None:
    """What the vendor says of a device that jax calls so, or None of one that is not known here."""
    return _HERE.get(device_kind)


def open_topology(name: str) -> Topology:
    """The devices of a name such as "v5e:16x16".

    Raises:
        ConfigError: an unknown kind, a shape that does not exist, or a compiler that is missing.
    """
    kind, _, shape = name.partition(":")
    if kind not in CHIPS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){0,2}", shape):
        raise ConfigError(
            f"--topology {name!r} is no kind and shape of {', '.join(CHIPS)}; give one such as "
            f"{_EXAMPLES}"
        )
    sizes = tuple(int(size) for size in shape.split("x"))
    if len(sizes) != _AXES.get(kind, len(sizes)) or (kind == "h100" and len(sizes) > 2):
        raise ConfigError(f"--topology {name} is no {kind}; give one such as {_EXAMPLES}")
    chip = CHIPS[kind]
    try:
        if chip.platform == "tpu":
            devices = tpus(kind, sizes)
        else:
            devices = h100s(*(sizes if len(sizes) == 2 else (1, *sizes)))
    except ImportError as error:
        raise ConfigError(f"--topology {name}: {error}") from error
    except Exception as error:  # whatever the compiler says of a shape
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"--topology {name} is none that the compiler knows ({reason}); give one such as "
            f"{_EXAMPLES}"
        ) from error
    if len(devices) != math.prod(sizes):
        raise ConfigError(f"--topology {name} gives {len(devices)} devices; give another shape")
    return Topology(name, chip, sizes, devices)
