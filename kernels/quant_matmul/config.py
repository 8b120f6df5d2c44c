"""Which kernel serves which number of rows, and how large its blocks are.

Invariant: looking a size up never measures anything. `tuned.json` holds what
`kernels/bench/tune.py` measured, per kind of device; a shape that is not in it gets the heuristic.
"""

import functools
import json
from pathlib import Path

from ..tpu_blocks import Blocks

DECODE_ROWS = 64
"""Up to this many rows of x the decode kernel serves: scaling its few sums costs less than scaling
every weight."""
GPU_ROWS = 256
"""The Mosaic GPU kernel serves up to this many rows of x; beyond, XLA expands the weight. A guess
until it is measured."""
GPU_BLOCK_ROWS = 64
"""Rows of x that one block of the GPU kernel multiplies."""
_GPU_BLOCKS = 264
_TABLE = Path(__file__).with_name("tuned.json")
_DECODE_BYTES = 2**20
_PREFILL_BLOCKS = Blocks(512, 512, 1024)


@functools.cache
def _tuned() -> dict[str, dict[str, list[int]]]:
    return json.loads(_TABLE.read_text())


def _key(kernel: str, bits: int, inputs: int, outputs: int, rows: int) -> str:
    return f"{kernel} b{bits} {inputs}x{outputs} m{rows}"


def decode_outputs(device: str, bits: int, inputs: int, outputs: int, rows: int) -> int:
    """Outputs of a block of the TPU decode kernel: about 1 MiB of words, a multiple of 128."""
    found = _tuned().get(device, {}).get(_key("decode", bits, inputs, outputs, rows))
    if found:
        return found[0]
    fitting = _DECODE_BYTES // max(1, inputs * bits // 8) // 128 * 128
    return min(max(128, fitting), 1024 if rows <= 16 else 512)


def prefill_blocks(
    device: str, bits: int, inputs: int, outputs: int, rows: int, dtype_bytes: int
) -> Blocks:
    """Blocks of the TPU kernels that expand the weight."""
    found = _tuned().get(device, {}).get(_key("prefill", bits, inputs, outputs, rows))
    if found:
        return Blocks(*found)
    m, o, i = _PREFILL_BLOCKS
    if dtype_bytes == 4:
        m, i = m // 2, i // 2
    return Blocks(min(m, rows), o, i)


def gpu_shares(blocks: int, tiles: int) -> int:
    """Into how many shares the GPU kernel divides the inputs: two blocks per processor of an H100,
    each with at least four tiles."""
    return max(1, min(_GPU_BLOCKS // blocks, tiles // 4))


def gpu_stages(bits: int, rows: int) -> int:
    """Tiles in flight in the GPU kernel: up to 8, in 96 KiB, so that two blocks share a processor.

    A tile has 256 inputs of x, 64 outputs of words and a few rows of the grid.
    """
    stage = 512 * rows + 2048 * bits + 2048
    return max(2, min(8, 96 * 2**10 // stage))
