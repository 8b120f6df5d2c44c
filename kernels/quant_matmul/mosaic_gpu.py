"""The product with a packed weight on Hopper GPUs, few rows of x at a time.

Invariant: codes become weights in registers only; see gpu_blocks.py for the walk. A word of the
"fragments" arrangement already is where it is needed: its two halves become two neighbouring
bfloat16 of an operand with one shift and one mask (the trick with the exponent is that of
pallas_tpu.py). Subtracting the zero from such a value is exact; the float32 sums of a group are
scaled. Many rows and the gradient expand the weight in XLA (config.py).
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from .. import gpu_blocks
from ..frozen import frozen_product, gradient_of
from . import config, xla
from .layout import TILE, KernelWeight, fields_of, from_fragments, rows_of_set, unpack_tiles
from .pallas_tpu import scales_and_offsets


def unsupported(x: jax.Array, weight: KernelWeight) -> str | None:
    """Why this kernel cannot serve, or None if it can."""
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        return f"x is {x.dtype}: bfloat16 and float32 are supported"
    if weight.arrangement != "fragments":
        return f"the words are arranged as {weight.arrangement}: prepare the weight for mosaic_gpu"
    if weight.inputs % 8 or weight.outputs % 8:
        return f"{weight.inputs} x {weight.outputs} are no multiples of 8"
    size = weight.group_size
    if weight.groups > 1 and size not in (32, 64, 128) and size % TILE:
        return f"group size {size} is not 32, 64, 128 or a multiple of {TILE}"
    return None


def quant_matmul(x: jax.Array, weight: KernelWeight, *, interpret=None) -> jax.Array:
    """x [M, I] times the weight: [M, O] of x's dtype. Differentiable in x; `order` is the caller's.

    Args:
        x: bfloat16 or float32 [M, I], in the order of the words.
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


def _value(x: jax.Array, weight: KernelWeight, interpret) -> jax.Array:
    chunk = TILE if weight.groups == 1 else min(TILE, weight.group_size)
    tiles_of_row = max(1, weight.group_size // TILE)

    def grid_block(block, tile):
        return (0 if weight.groups == 1 else tile // tiles_of_row), block

    words = weight.words.reshape(weight.words.shape[0], -1, 256)
    grid_rows = TILE // chunk if weight.groups > 1 else 1
    return gpu_blocks.product(
        x,
        [
            gpu_blocks.Operand(
                words, (1, 2 * weight.bits, 256), lambda block, tile: (block, tile, 0)
            ),
            gpu_blocks.Operand(weight.grid, (grid_rows, gpu_blocks.OUTPUTS), grid_block),
        ],
        functools.partial(_add_tile, weight=weight, chunk=chunk, interpreted=interpret is not None),
        outputs=weight.outputs,
        bits=weight.bits,
        chunk=chunk,
        interpret=interpret,
    )


_product = frozen_product(_value, gradient_of(xla.multiply))


def _add_tile(
    x_smem,
    words_smem,
    grid_smem,
    total: jax.Array,
    *,
    weight: KernelWeight,
    chunk: int,
    interpreted: bool,
) -> jax.Array:
    """total [64, M] and the product of one tile of 256 inputs, `chunk` of them at a time."""
    words = gpu_blocks.load(words_smem.at[0], gpu_blocks.words_layout(2 * weight.bits), interpreted)
    pieces = (_codes_interpreted if interpreted else _codes)(words, weight.bits, chunk)
    for k, codes in enumerate(pieces):
        grid = gpu_blocks.load(grid_smem.at[k], plgpu.Layout.WGMMA.reduce(1), interpreted)
        scales, offsets = scales_and_offsets(grid, weight)
        spread = jax.lax.broadcast_in_dim(offsets.astype(jnp.bfloat16), codes.shape, (0,))
        x_part = x_smem.at[:, pl.ds(k * chunk, chunk)]
        product = gpu_blocks.tensor_core(codes - spread, x_part, interpreted)
        total += product * jax.lax.broadcast_in_dim(scales, product.shape, (0,))
    return total


def _codes(words: jax.Array, bits: int, chunk: int) -> list[jax.Array]:
    """One tile of words to bfloat16 codes, 2^bits + q (q with 8 bits), as pieces [64, chunk]."""
    return gpu_blocks.from_registers(functools.partial(_registers, bits=bits), [words], chunk)


def _registers(packed, bits: int) -> list[ir.Value]:
    """Words of two bfloat16, in the order of inputs (16 at a time) and of a thread's share.

    `packed` holds a vector of 4 words for every 8 rows of the tile.
    """
    i32 = ir.IntegerType.get_signless(32)
    vectors_of_set = rows_of_set(bits) // 8
    registers = []
    for pieces in fields_of(bits):
        for vector in range(vectors_of_set):
            for element in range(4):
                words = [
                    gpu_blocks.element(packed[part * vectors_of_set + vector], element)
                    for part in range(len(packed) // vectors_of_set)
                ]
                registers.append(_pair(words, pieces, bits, i32))
    return registers


def _pair(words: list[ir.Value], pieces, bits: int, i32: ir.Type) -> ir.Value:
    if bits == 8:
        ((_, shift, mask, _),) = pieces
        halves = []
        for place in (shift, shift + 16):
            field = arith.andi(arith.shrui(words[0], mgpu.c(place, i32)), mgpu.c(mask, i32))
            exact = mgpu.utils.bitcast(arith.uitofp(ir.F32Type.get(), field), i32)
            halves.append(exact)
        low = arith.shrui(halves[0], mgpu.c(16, i32))
        return arith.ori(low, halves[1])
    result = mgpu.c(((127 + bits) << 7) * 0x00010001, i32)
    for part, shift, mask, position in pieces:
        place = 7 - bits + position
        word = words[part]
        if shift > place:
            word = arith.shrui(word, mgpu.c(shift - place, i32))
        elif shift < place:
            word = arith.shli(word, mgpu.c(place - shift, i32))
        masked = arith.andi(word, mgpu.c((mask << place) * 0x00010001, i32))
        result = arith.ori(result, masked)
    return result


def _codes_interpreted(words: jax.Array, bits: int, chunk: int) -> list[jax.Array]:
    """What `_codes` computes, for JAX's interpreter, which knows no registers."""
    codes = unpack_tiles(from_fragments(words.reshape(1, bits, 512)), bits).astype(jnp.bfloat16)
    codes = codes + jnp.bfloat16(0 if bits == 8 else 2**bits)
    return [codes[start : start + chunk].T for start in range(0, TILE, chunk)]
