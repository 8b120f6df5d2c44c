"""The product with a 2:4 sparse weight on Hopper GPUs, few rows of x at a time.

Invariant: the dense matrix exists in registers only, 64 outputs by 256 inputs at a time; see
gpu_blocks.py for the walk. A thread's words of the "fragments" arrangement are the kept values of
quads of which it holds all four inputs: thread 4 a + b of a warp has columns 2 b, 2 b + 1, 2 b + 8
and 2 b + 9 of every 16 columns of an operand, so those four stand for the inputs of quad b, and x
is put in that order (`reordered`). No value moves between threads.

Many rows and the gradient expand the weight in XLA.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jaxlib.mlir import ir

from .. import gpu_blocks
from ..frozen import frozen_product, gradient_of
from ..quant_matmul import config
from ..quant_matmul.layout import TILE, from_fragments
from . import xla
from .layout import SparseWeight

_FIELDS = 8
"""Fields of a word of positions: quads of a tile over the rows of its words."""
_BITS = 9
"""Per input: half a value of 16 bits and a quarter of a code of 4."""


def unsupported(x: jax.Array, weight: SparseWeight) -> str | None:
    """Why this kernel cannot serve, or None if it can."""
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        return f"x is {x.dtype}: bfloat16 and float32 are supported"
    if weight.bits is not None:
        return f"values of {weight.bits} bits: bfloat16 values are supported"
    if weight.arrangement != "fragments":
        return f"the weight is arranged as {weight.arrangement}: compress it for mosaic_gpu"
    if weight.inputs % 16:
        return f"{weight.inputs} inputs are no multiple of 16"
    return None


def sparse24_matmul(x: jax.Array, weight: SparseWeight, *, interpret=None) -> jax.Array:
    """x [M, I] times the weight: [M, O] of x's dtype. Differentiable in x.

    Args:
        x: bfloat16 or float32 [M, I].
        weight: see layout.py, arranged as "fragments".
        interpret: `plgpu`'s interpreter parameters, for tests.

    Raises:
        ValueError: what `unsupported` says.
    """
    reason = unsupported(x, weight)
    if reason:
        raise ValueError(reason)
    if x.shape[0] > config.GPU_ROWS:
        return xla.multiply(x, weight)
    return _product(x, weight, interpret)


def _value(x: jax.Array, weight: SparseWeight, interpret) -> jax.Array:
    place = lambda block, tile: (block, tile, 0)
    return gpu_blocks.product(
        reordered(x),
        [
            gpu_blocks.Operand(_rows_of_256(weight.positions), (1, 2, 256), place),
            gpu_blocks.Operand(_rows_of_256(weight.values), (1, 2 * _FIELDS, 256), place),
        ],
        functools.partial(_add_tile, interpreted=interpret is not None),
        outputs=weight.outputs,
        bits=_BITS,
        interpret=interpret,
    )


_product = frozen_product(_value, gradient_of(xla.multiply))


def _rows_of_256(fragments: jax.Array) -> jax.Array:
    return fragments.reshape(fragments.shape[0], -1, 256)


def reordered(x: jax.Array) -> jax.Array:
    """x [M, I] in the order of an operand's columns: 8 h + 2 b + e of 16 is input 4 b + 2 h + e."""
    quads = x.reshape(x.shape[0], -1, 4, 2, 2)
    return quads.swapaxes(2, 3).reshape(x.shape)


def _add_tile(x_smem, positions_smem, values_smem, total, *, interpreted: bool):
    layout = gpu_blocks.words_layout(2)
    codes = gpu_blocks.load(positions_smem.at[0], layout, interpreted)
    halves = []
    for field in range(_FIELDS):
        of_field = values_smem.at[0, pl.ds(2 * field, 2)]
        halves += expand(gpu_blocks.load(of_field, layout, interpreted), codes, field)
    make = _operand_interpreted if interpreted else _operand
    return total + gpu_blocks.tensor_core(make(halves), x_smem, interpreted)


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


def _operand(halves: list[jax.Array]) -> jax.Array:
    """What `expand` gave for every field to an operand [64, 256] of the tensor cores."""
    (operand,) = gpu_blocks.from_registers(registers, halves, TILE)
    return operand


def registers(*halves) -> list[ir.Value]:
    """Registers of an operand from a thread's vectors of `expand`, one sequence for each."""
    # A vector holds quad b of outputs a and a + 8, then quad b + 4 of both; see `to_fragments`.
    return [
        gpu_blocks.element(half[0], 2 * quad + output)
        for field in range(_FIELDS)
        for quad in range(2)
        for half in halves[2 * field : 2 * field + 2]
        for output in range(2)
    ]


def _operand_interpreted(halves: list[jax.Array]) -> jax.Array:
    """What `_operand` makes, for JAX's interpreter, which knows no registers."""
    words = from_fragments(jnp.stack(halves).reshape(1, -1, 512))
    pairs = jax.lax.bitcast_convert_type(words, jnp.bfloat16)
    # [field, half, quad / 4, b, output, e] -> [output, field, quad / 4, half, b, e]
    pairs = pairs.reshape(_FIELDS, 2, 2, 4, gpu_blocks.OUTPUTS, 2)
    return pairs.transpose(4, 0, 2, 1, 3, 5).reshape(gpu_blocks.OUTPUTS, TILE)
