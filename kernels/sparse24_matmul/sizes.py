"""How large the blocks of the TPU kernel are."""

from ..tpu_blocks import Blocks
from ..tuned import measured


def blocks(
    device: str, bits: int | None, inputs: int, outputs: int, rows: int, dtype_bytes: int
) -> Blocks:
    """Blocks for x [rows, inputs]; inputs come in multiples of 512."""
    found = measured(device, "sparse24", bits or 16, inputs, outputs, rows)
    if found and dtype_bytes == 2:
        return Blocks(*found)
    # Few rows leave room for wide blocks, whose transfers hide the cost of a step.
    outputs_of_block = 1024 if rows <= 64 and dtype_bytes == 2 else 512
    inputs_of_block = 512 if dtype_bytes == 4 else 1024
    return Blocks(min(rows, 1024 // dtype_bytes), outputs_of_block, inputs_of_block)
