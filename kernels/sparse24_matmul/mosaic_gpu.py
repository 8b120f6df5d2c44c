"""The product with a 2:4 sparse weight on Hopper GPUs, few rows of x at a time.

Invariant: the dense matrix exists in registers only, 64 outputs by up to 256 inputs at a time; see
gpu_blocks.py for the walk. A thread's words of the "fragments" arrangement are the kept values of
quads of which it holds all four inputs: thread 4 a + b of a warp has columns 2 b, 2 b + 1, 2 b + 8
and 2 b + 9 of every 16 columns of an operand, so if 16 columns are inputs 0 and 1 of eight quads
and the next 16 their inputs 2 and 3, it has quads b and b + 4. x is put in that order
(`reordered`), and no value moves between threads.

Quantised values become bfloat16 codes and lose their zero before they are laid out: what was
dropped is 0, exactly. Many rows and the gradient expand the weight in XLA.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from .. import dispatch, gpu_blocks
from ..frozen import checked
from ..stack import as_stack
from . import xla
from .layout import CODED_QUADS, SparseWeight

_FIELDS = 8
"""Fields of a word of positions: quads of a tile over the rows of its words."""
_CODED_TILE = 4 * CODED_QUADS
"""Inputs of a tile of quantised values; a tile of bfloat16 ones has 256."""


unsupported = functools.partial(dispatch.unsupported, backend="mosaic_gpu", span=_CODED_TILE)


def sparse24_matmul(x: jax.Array, weight: SparseWeight, *, interpret=None) -> jax.Array:
    """x [M, I] times the weight: [M, O] of x's dtype. Differentiable in x.

    Args:
        x: bfloat16 or float32 [M, I].
        weight: see layout.py, arranged as "fragments".
        interpret: `plgpu`'s interpreter parameters, for tests.

    Raises:
        ValueError: what `unsupported` says.
    """
    return _product(x, weight, interpret)


def _value(x: jax.Array, weight: SparseWeight, interpret) -> jax.Array:
    stack, layer = as_stack(weight)
    words, grid = gpu_blocks.words_operand, gpu_blocks.grid_operand
    multiply = functools.partial(
        gpu_blocks.product, reordered(x), outputs=weight.outputs, layer=layer, interpret=interpret
    )
    if weight.grid is None:
        return multiply(
            [words(stack.positions, 1), words(stack.values, _FIELDS)],
            functools.partial(_add_tile, interpreted=interpret is not None),
            bits=9,  # half a value of 16 bits and a quarter of a code of 4
        )
    assert weight.bits is not None and stack.grid is not None
    chunk = gpu_blocks.chunk_of(weight.groups, weight.group_size)
    return multiply(
        [
            words(stack.positions, 2),
            words(stack.values, weight.bits),
            grid(stack.grid, weight.groups, weight.group_size, _CODED_TILE),
        ],
        functools.partial(
            _add_coded_tile, bits=weight.bits, chunk=chunk, interpreted=interpret is not None
        ),
        bits=weight.bits / 2 + 1,
        chunk=chunk,
        tile=_CODED_TILE,
    )


_product = checked(gpu_blocks.few_rows_product(_value, xla.multiply), unsupported)


def reordered(x: jax.Array) -> jax.Array:
    """x [M, I] in the order of an operand's columns, raised to whole 32.

    Column 16 h + 2 q + e of 32 is input 4 q + 2 h + e.
    """
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % 32)))
    quads = x.reshape(x.shape[0], -1, 8, 2, 2)
    return quads.swapaxes(2, 3).reshape(x.shape)


def _add_tile(x_smem, positions_smem, values_smem, total, *, interpreted: bool):
    codes = gpu_blocks.load_words(positions_smem, 0, interpreted)
    halves = []
    for field in range(_FIELDS):
        halves += expand(gpu_blocks.load_words(values_smem, field, interpreted), codes, field)
    return total + gpu_blocks.tensor_core(
        gpu_blocks.operand(halves, interpreted), x_smem, interpreted
    )


def _add_coded_tile(
    x_smem, positions_smem, values_smem, grid_smem, total, *, bits: int, chunk: int, interpreted
):
    """The sum so far and the product of one tile of quantised values."""
    positions = [gpu_blocks.load_words(positions_smem, k, interpreted) for k in range(2)]

    def lay_out(kept: jax.Array, piece: int) -> jax.Array:
        halves = []
        for k, values in enumerate(gpu_blocks.words_of(kept, interpreted), piece * chunk // 32):
            halves += expand(values, positions[k // _FIELDS], k % _FIELDS)
        return gpu_blocks.operand(halves, interpreted)

    return gpu_blocks.add_coded_tile(
        x_smem,
        values_smem,
        grid_smem,
        total,
        bits=bits,
        scale_dtype="float16",
        chunk=chunk,
        interpreted=interpreted,
        lay_out=lay_out,
    )


def expand(values: jax.Array, codes: jax.Array, field: int) -> tuple[jax.Array, jax.Array]:
    """Quads laid out: words of inputs 0 and 1, and of inputs 2 and 3, the lower input below.

    Args:
        values: int32, a quad's first kept value in the lower half and its second one above it.
        codes: int32 of the same shape, words of positions.
        field: which field of those words.

    With first < second, "first is 1" is bit 0 of a code, "first is 2" bit 1, "second is 2" the lack
    of bit 2 and "second is 1" that of bit 3: no position is ever taken out of its word.
    """
    masks = np.uint32(1) << np.arange(4 * field, 4 * field + 4, dtype=np.uint32)
    bit = [(codes & mask) != 0 for mask in masks.view(np.int32)]
    none, lower, upper = jnp.int32(0), jnp.int32(2**16 - 1), jnp.int32(-(2**16))
    front = jnp.where(bit[1], none, values & lower)
    front = jnp.where(bit[3], front, values)
    front = jnp.where(bit[0], values << 16, front)
    back = jnp.where(bit[3], values & upper, none)
    back = jnp.where(bit[1], values, back)
    back = jnp.where(bit[2], back, jax.lax.shift_right_logical(values, jnp.int32(16)))
    return front, back
