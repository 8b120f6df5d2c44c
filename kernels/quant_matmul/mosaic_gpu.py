"""The product with a packed weight on Hopper GPUs, few rows of x at a time.

Invariant: codes become weights in registers only; see gpu_blocks.py for the walk. A word of the
"fragments" arrangement already is where it is needed: its two halves become two neighbouring
bfloat16 of an operand with one shift and one mask (the trick with the exponent is that of
pallas_tpu.py). Subtracting the zero from such a value is exact; the float32 sums of a group are
scaled. Many rows and the gradient expand the weight in XLA (config.py).
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .. import gpu_blocks
from ..frozen import frozen_product, gradient_of
from ..stack import stacked
from . import config, xla
from .layout import TILE, KernelWeight, fields_of, rows_of_set
from .pallas_tpu import pairs_of_field, scales_and_offsets


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
    chunk = gpu_blocks.chunk_of(weight.groups, weight.group_size)
    stack, layer = stacked(weight)
    return gpu_blocks.product(
        x,
        [
            gpu_blocks.words_operand(stack.words, weight.bits),
            gpu_blocks.grid_operand(stack.grid, weight.groups, weight.group_size, TILE),
        ],
        functools.partial(
            add_tile,
            bits=weight.bits,
            scale_dtype=weight.scale_dtype,
            chunk=chunk,
            interpreted=interpret is not None,
        ),
        outputs=weight.outputs,
        layer=layer,
        bits=weight.bits,
        chunk=chunk,
        interpret=interpret,
    )


_product = frozen_product(_value, gradient_of(xla.multiply))


def add_tile(
    x_smem,
    words_smem,
    grid_smem,
    total: jax.Array,
    *,
    bits: int,
    scale_dtype: str,
    chunk: int,
    interpreted: bool,
    lay_out: Callable[[jax.Array, int], jax.Array] = lambda centred, _: centred,
) -> jax.Array:
    """The sum so far and the product of one tile, a piece of the tile's 256 codes at a time.

    Args:
        x_smem: [M, N], the tile's inputs.
        words_smem: int32 [1, 2 bits, 256].
        grid_smem: int32 [rows, 64], one row or more for equal runs of the inputs.
        total: float32 [64, M].
        bits: of a code.
        scale_dtype: of the grid.
        chunk: inputs of a piece.
        interpreted: whether JAX's interpreter runs this.
        lay_out: makes the weights [64, chunk] of a piece of its codes less their zeros and of its
            number; by default those are the weights.
    """
    vectors = [gpu_blocks.load_words(words_smem, k, interpreted) for k in range(bits)]
    pieces, pairs = x_smem.shape[1] // chunk, code_words(vectors, bits)
    for k in range(pieces):
        codes = gpu_blocks.operand(list(itertools.islice(pairs, 16 // pieces)), interpreted)
        row = grid_smem.at[k * grid_smem.shape[0] // pieces]
        grid = gpu_blocks.load(row, plgpu.Layout.WGMMA.reduce(1), interpreted)
        scales, offsets = scales_and_offsets(grid, bits, scale_dtype)
        spread = jax.lax.broadcast_in_dim(offsets.astype(jnp.bfloat16), codes.shape, (0,))
        x_part = x_smem.at[:, pl.ds(k * chunk, chunk)]
        product = gpu_blocks.tensor_core(lay_out(codes - spread, k), x_part, interpreted)
        total += product * jax.lax.broadcast_in_dim(scales, product.shape, (0,))
        # LLVM would put off every sum to the end, with the products of all pieces in registers.
        total = jax.lax.optimization_barrier(total)
    return total


def code_words(vectors: Sequence[jax.Array], bits: int) -> Iterator[jax.Array]:
    """One tile of codes as words of two bfloat16, 2^bits + q, or q with 8 bits.

    Args:
        vectors: the tile's words, `bits` sets int32 [2, 256].
        bits: of a code.

    Yields:
        16 such sets, of 16 codes of 64 outputs each, as `gpu_blocks.operand` takes them.
    """
    of_set = rows_of_set(bits) // 8
    for pieces in fields_of(bits):
        for vector in range(of_set):
            yield pairs_of_field(vectors[vector::of_set], pieces, bits)
