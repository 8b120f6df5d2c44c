"""Sizes of blocks that were measured: `tuned.json`, per kind of device.

Invariant: looking a size up never measures anything, `kernels/bench/tune.py` does. What the table
does not have gets the heuristic of the kernel that asks.
"""

import functools
import json
from pathlib import Path

TABLE = Path(__file__).with_name("tuned.json")


@functools.cache
def table() -> dict[str, dict[str, list[int]]]:
    """The table: kind of device -> `key` -> sizes."""
    return json.loads(TABLE.read_text())


def key(kernel: str, bits: float, inputs: int, outputs: int, rows: int) -> str:
    """The name of a shape in the table, of bfloat16 x.

    Args:
        kernel: "decode", "prefill" or "sparse24" (TPU), "gpu" or "gpu512" (its tiles).
        bits: of a code, 16 for bfloat16 values; of the GPU's 2:4 kernels what an input takes.
    """
    return f"{kernel} b{bits} {inputs}x{outputs} m{rows}"


def measured(
    device: str, kernel: str, bits: float, inputs: int, outputs: int, rows: int
) -> list[int] | None:
    """The sizes of a kernel at a shape on a kind of device, or None if nobody measured them."""
    return table().get(device, {}).get(key(kernel, bits, inputs, outputs, rows))
