"""How large the blocks of the TPU kernel are.

Invariant: looking a size up never measures anything; see quant_matmul/config.py.
"""

import functools
import json
from pathlib import Path

from ..tpu_blocks import Blocks

_TABLE = Path(__file__).with_name("tuned.json")


@functools.cache
def _tuned() -> dict[str, dict[str, list[int]]]:
    return json.loads(_TABLE.read_text())


def blocks(
    device: str, bits: int | None, inputs: int, outputs: int, rows: int, dtype_bytes: int
) -> Blocks:
    """Blocks for x [rows, inputs]; inputs come in multiples of 512."""
    found = _tuned().get(device, {}).get(f"b{bits or 16} {inputs}x{outputs} m{rows}")
    if found:
        return Blocks(*found)
    # Few rows leave room for wide blocks, whose transfers hide the cost of a step.
    outputs_of_block = 1024 if rows <= 64 and dtype_bytes == 2 else 512
    inputs_of_block = 512 if dtype_bytes == 4 else 1024
    return Blocks(min(rows, 1024 // dtype_bytes), outputs_of_block, inputs_of_block)
