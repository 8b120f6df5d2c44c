"""What the vendors say of their devices."""

import re
from dataclasses import dataclass

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
# What JAX calls them where they are.
_KINDS = {
    r"TPU v4": CHIPS["v4"],
    r"TPU v5 ?(lite|e)": CHIPS["v5e"],
    r"TPU v5p?": CHIPS["v5p"],
    r"TPU v6 ?(lite|e)": CHIPS["v6e"],
    r"NVIDIA H100 80GB HBM3": CHIPS["h100"],
    r"NVIDIA H200": _H200,
}


def chip_here(device_kind: str) -> Chip | None:
    """What the vendor says of a device that JAX calls so, or None of one that is not known here."""
    found = (chip for pattern, chip in _KINDS.items() if re.fullmatch(pattern, device_kind))
    return next(found, None)
