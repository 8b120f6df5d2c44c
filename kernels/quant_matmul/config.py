"""Which kernel serves which number of rows, and how large its blocks are.

Invariant: looking a size up never measures anything. `tuned.json` holds what
`kernels/bench/tune.py` measured, per kind of device; a shape that is not in it gets the heuristic.
"""

import functools
import json
from pathlib import Path
from typing import NamedTuple

from ..tpu_blocks import Blocks

DECODE_ROWS = 64
"""Up to this many rows of x the TPU decode kernel serves: scaling its few sums costs less than
scaling every weight."""
GPU_ROWS = 256
"""The Mosaic GPU kernel serves up to this many rows of x; beyond, XLA expands the weight. A guess
until it is measured."""
TABLE = Path(__file__).with_name("tuned.json")
_DECODE_BYTES = 2**20
_PREFILL_BLOCKS = Blocks(512, 512, 1024)
_GPU_BLOCK_ROWS = 64
_GPU_BLOCKS = 264
_GPU_SHARED_BYTES = 96 * 2**10


class GpuSizes(NamedTuple):
    """Rows of x of a block, shares of the inputs, tiles in flight."""

    rows: int
    shares: int
    stages: int


@functools.cache
def tuned() -> dict[str, dict[str, list[int]]]:
    """The table: kind of device -> `key` -> sizes."""
    return json.loads(TABLE.read_text())


def key(kernel: str, bits: float, inputs: int, outputs: int, rows: int) -> str:
    """The name of a shape in the table, of bfloat16 x.

    Args:
        kernel: "decode", "prefill" or "sparse24" (TPU), "gpu" or "gpu512" (its tiles).
        bits: of a code, 16 for bfloat16 values; of the GPU's 2:4 kernels what an input takes.
    """
    return f"{kernel} b{bits} {inputs}x{outputs} m{rows}"


def decode_outputs(device: str, bits: int, inputs: int, outputs: int, rows: int) -> int:
    """Outputs of a block of the TPU decode kernel: about 1 MiB of words, a multiple of 128."""
    found = tuned().get(device, {}).get(key("decode", bits, inputs, outputs, rows))
    if found:
        return found[0]
    fitting = _DECODE_BYTES // max(1, inputs * bits // 8) // 128 * 128
    return min(max(128, fitting), 1024 if rows <= 16 else 512)


def prefill_blocks(
    device: str, bits: int, inputs: int, outputs: int, rows: int, dtype_bytes: int
) -> Blocks:
    """Blocks of the TPU kernels that expand the weight."""
    found = tuned().get(device, {}).get(key("prefill", bits, inputs, outputs, rows))
    if found and dtype_bytes == 2:
        return Blocks(*found)
    m, o, i = _PREFILL_BLOCKS
    if dtype_bytes == 4:
        m, i = m // 2, i // 2
    return Blocks(min(m, rows), o, i)


def gpu_sizes(
    device: str, bits: float, inputs: int, outputs: int, rows: int, tile: int = 256
) -> GpuSizes:
    """Sizes of the Mosaic GPU kernels, for `bits` of the weight per input and tiles of 256 or 512.

    The heuristic: two blocks per processor of an H100, each with at least 1024 inputs, and up to 8
    tiles in flight in 96 KiB, so that both blocks fit. A tile has that many inputs of x, 64 outputs
    of words and a few rows of the grid.
    """
    name = "gpu" if tile == 256 else f"gpu{tile}"
    found = tuned().get(device, {}).get(key(name, bits, inputs, outputs, rows))
    if found:
        return GpuSizes(*found)
    block_rows = min(-(-rows // 8) * 8, _GPU_BLOCK_ROWS)
    blocks = -(-outputs // 64) * -(-rows // block_rows)
    shares = max(1, min(_GPU_BLOCKS // blocks, -(-inputs // 256) // 4))
    stages = int(_GPU_SHARED_BYTES // (2 * tile * block_rows + 8 * tile * bits + 2048))
    return GpuSizes(block_rows, shares, max(2, min(8, stages)))
