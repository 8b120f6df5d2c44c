"""How large the blocks of the TPU kernels are, and which of the two serves how many rows."""

from ..tpu_blocks import Blocks
from ..tuned import measured

DECODE_ROWS = 64
"""Up to this many rows of x the decode kernel serves, which scales few sums, not every weight."""
_DECODE_BYTES = 2**20
_PREFILL_BLOCKS = Blocks(512, 512, 1024)


def decode_outputs(device: str, bits: int, inputs: int, outputs: int, rows: int) -> int:
    """Outputs of a block of the decode kernel: about 1 MiB of words, a multiple of 128."""
    found = measured(device, "decode", bits, inputs, outputs, rows)
    if found:
        return found[0]
    fitting = _DECODE_BYTES // max(1, inputs * bits // 8) // 128 * 128
    return min(max(128, fitting), 1024 if rows <= 16 else 512)


def prefill_blocks(
    device: str, bits: int, inputs: int, outputs: int, rows: int, dtype_bytes: int
) -> Blocks:
    """Blocks of the kernel that expands the weight, and of the gradient."""
    found = measured(device, "prefill", bits, inputs, outputs, rows)
    if found and dtype_bytes == 2:
        return Blocks(*found)
    of_rows, of_outputs, of_inputs = _PREFILL_BLOCKS
    if dtype_bytes == 4:
        of_rows, of_inputs = of_rows // 2, of_inputs // 2
    return Blocks(min(of_rows, rows), of_outputs, of_inputs)
