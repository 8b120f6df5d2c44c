"""Devices that are not here, by name.

A topology is a kind and a shape: `v5e:16x16` (TPUs by the torus they stand in) or `h100:4x8`
(hosts times GPUs of a host).
"""

import math
import re
from dataclasses import dataclass
from typing import Any

from idp_jax.config import ConfigError
from idp_jax.jobs.chips import CHIPS, Chip
from idp_jax.kernels.targets import h100s, tpus

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
