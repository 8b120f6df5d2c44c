"""The walk of the Hopper kernels over a compressed weight, few rows of x at a time.

Invariant: what a weight consists of is read from memory once for every block of rows of x, and
becomes bfloat16 in registers only. The tensor cores compute y^T = W^T x^T: 64 outputs by the rows
of x, with W^T taken from registers. x in float32 goes as three bfloat16 parts.

A block of the grid takes 64 outputs and a share of the inputs, so that small matrices fill the
machine; shares are summed outside. JAX's interpreter knows no layouts and no registers: functions
of this file say what differs there.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import vector as vector_dialect

from .codes import (
    TILE,
    fields_of,
    from_fragments,
    pairs_of_field,
    rows_of_set,
    scales_and_offsets,
    to_fragments,
)
from .devices import device_kind
from .frozen import Product, frozen_product, gradient_of
from .tuned import measured

MOST_ROWS = 256
"""The kernels serve up to this many rows of x; beyond, XLA expands the weight. A guess until it is
measured."""
OUTPUTS = 64
"""Outputs of a block."""
WORDS = plgpu.Layout.WG_STRIDED((2, 256), vec_size=4)
"""The registers of 512 words of the "fragments" arrangement: a thread has four of them."""


_BLOCK_ROWS = 64
_BLOCKS = 264
_SHARED_BYTES = 96 * 2**10


class Sizes(NamedTuple):
    """Rows of x of a block, shares of the inputs, tiles in flight."""

    rows: int
    shares: int
    stages: int


def sizes(
    device: str, bits: float, inputs: int, outputs: int, rows: int, tile: int = TILE
) -> Sizes:
    """Sizes for `bits` of the weight per input and tiles of 256 or 512 inputs.

    The heuristic: two blocks per processor of an H100, each with at least 1024 inputs, and up to 8
    tiles in flight in 96 KiB, so that both blocks fit. A tile has that many inputs of x, 64 outputs
    of words and a few rows of the grid.
    """
    name = "gpu" if tile == TILE else f"gpu{tile}"
    found = measured(device, name, bits, inputs, outputs, rows)
    if found:
        return Sizes(*found)
    block_rows = min(-(-rows // 8) * 8, _BLOCK_ROWS)
    blocks = -(-outputs // OUTPUTS) * -(-rows // block_rows)
    shares = max(1, min(_BLOCKS // blocks, -(-inputs // TILE) // 4))
    stages = int(_SHARED_BYTES // (2 * tile * block_rows + 8 * tile * bits + 2048))
    return Sizes(block_rows, shares, max(2, min(8, stages)))


class Operand(NamedTuple):
    """An array that a weight consists of.

    Attributes:
        array: as it lies in memory, layers in front.
        block: the shape of what 64 outputs of one tile need; it divides a layer's
            first axis.
        index: (block of outputs, tile) -> the place of that in a layer, in blocks.
    """

    array: jax.Array
    block: tuple[int, ...]
    index: Callable[..., tuple]


def words_operand(words: jax.Array, sets: int) -> Operand:
    """Fragments int32 [layers, ceil(O / 64), N, 512], of which a tile has `sets`."""
    rows = words.reshape(*words.shape[:2], -1, 256)
    return Operand(rows, (1, 2 * sets, 256), lambda block, tile: (block, tile, 0))


def grid_operand(grid: jax.Array, groups: int, group_size: int, tile: int) -> Operand:
    """Words int32 [layers, rows, O], a row for each group of inputs."""
    rows = 1 if groups == 1 else max(1, tile // group_size)
    tiles_of_row = max(1, group_size // tile)

    def index(block, tile):
        return (0 if groups == 1 else tile // tiles_of_row), block

    return Operand(grid, (rows, OUTPUTS), index)


def few_rows_product(value: Product, multiply: Callable[[jax.Array, Any], jax.Array]) -> Product:
    """What `value` computes for few rows of x; XLA's `multiply` takes many, and the gradient."""
    few = frozen_product(value, gradient_of(multiply))

    def product(x, weight, interpret):
        return multiply(x, weight) if x.shape[0] > MOST_ROWS else few(x, weight, interpret)

    return product


def chunk_of(groups: int, group_size: int) -> int:
    """Inputs of a product on the tensor cores, all of one group."""
    return TILE if groups == 1 else min(TILE, group_size)


def product(
    x: jax.Array,
    operands: Sequence[Operand],
    add_tile: Callable,
    *,
    outputs: int,
    layer: jax.Array,
    bits: float,
    chunk: int = TILE,
    tile: int = TILE,
    interpret=None,
) -> jax.Array:
    """x times a weight.

    Args:
        x: bfloat16 or float32 [M, I], in the order in which `add_tile` multiplies.
        operands: what the weight consists of.
        add_tile: (x in shared memory [rows, tile], the operands there, the sum float32 [64, rows])
            -> the sum with the product of one tile added.
        outputs: O.
        layer: int32 [1], the layer that is meant.
        bits: what the weight takes per input, for the choice of sizes.
        chunk: inputs of a product on the tensor cores: 32, 64, 128 or 256.
        tile: inputs of a tile.
        interpret: `plgpu`'s interpreter parameters, for tests.

    Returns:
        [M, O] of x's dtype.
    """
    parts = _parts(x)
    (count, inputs), blocks = parts.shape, -(-outputs // OUTPUTS)
    rows, shares, stages = sizes(device_kind(), bits, inputs, outputs, count, tile)
    row_blocks, steps = -(-count // rows), -(-inputs // (tile * shares))
    if interpret is not None:
        # Outside an array the hardware reads zeros (or another layer), the interpreter fails.
        parts = _pad_to(parts, (row_blocks * rows, steps * shares * tile))
        operands = [_padded(o, o.index(blocks - 1, steps * shares - 1)) for o in operands]
    transposed = plgpu.kernel(
        functools.partial(
            _body,
            operands=operands,
            add_tile=add_tile,
            steps=steps,
            stages=stages,
            tile=tile,
            chunk=chunk,
            interpreted=interpret is not None,
        ),
        out_type=jax.ShapeDtypeStruct((shares, blocks * OUTPUTS, row_blocks * rows), jnp.float32),
        grid=(blocks, row_blocks, shares),
        grid_names=("outputs", "rows", "share"),
        scratch_types=[plgpu.SMEM((OUTPUTS, rows), jnp.float32)],
        interpret=interpret,
    )(layer, parts, *(o.array.reshape(-1, *o.array.shape[2:]) for o in operands))
    # Shares of the inputs are summed, then (below) the three parts of float32 rows.
    y = transposed.sum(0)[:outputs, :count].T
    return y.reshape(-1, x.shape[0], outputs).sum(0).astype(x.dtype)


def _parts(x: jax.Array) -> jax.Array:
    """Rows bfloat16 whose sum is x [M, I]: x, or three times M rows for float32."""
    if x.dtype == jnp.bfloat16:
        return x
    parts, rest = [], x
    for _ in range(3):
        # Not `astype` twice, which XLA may take for nothing.
        parts.append(jax.lax.reduce_precision(rest, 8, 7))
        rest = rest - parts[-1]
    return jnp.concatenate(parts).astype(jnp.bfloat16)


def _body(
    layer_gmem,
    x_gmem,
    *refs,
    operands: Sequence[Operand],
    add_tile: Callable,
    steps: int,
    stages: int,
    tile: int,
    chunk: int,
    interpreted: bool,
):
    *operands_gmem, y_gmem, y_smem = refs
    block, row_block, share = (jax.lax.axis_index(name) for name in ("outputs", "rows", "share"))
    layer = layer_gmem[0]
    first, rows, swizzle = share * steps, y_smem.shape[1], min(128, 2 * chunk)
    x_spec = plgpu.BlockSpec(
        (rows, tile),
        lambda k: (row_block, first + k),
        transforms=(plgpu.TilingTransform((8, swizzle // 2)), plgpu.SwizzleTransform(swizzle)),
    )
    zero = jnp.zeros((OUTPUTS, rows), jnp.float32)
    if not interpreted:
        zero = plgpu.layout_cast(zero, plgpu.Layout.WGMMA)
    total = plgpu.emit_pipeline(
        lambda _, *parts: add_tile(*parts),
        grid=(steps,),
        in_specs=[x_spec] + [_spec(operand, layer, block, first) for operand in operands],
        max_concurrent_steps=stages,
        init_carry=zero,
    )(x_gmem, *operands_gmem)
    y_smem[...] = total
    plgpu.commit_smem()
    outputs, columns = pl.ds(block * OUTPUTS, OUTPUTS), pl.ds(row_block * rows, rows)
    plgpu.copy_smem_to_gmem(y_smem, y_gmem.at[share, outputs, columns])
    plgpu.wait_smem_to_gmem(0)


def _spec(operand: Operand, layer, block, first):
    # Layers and their first axis are one axis in the kernel: places count from the layer's start.
    def index(k):
        row, *rest = operand.index(block, first + k)
        return (layer * (operand.array.shape[1] // operand.block[0]) + row, *rest)

    return plgpu.BlockSpec(operand.block, index)


def _padded(operand: Operand, last: tuple) -> Operand:
    shape = [(place + 1) * size for place, size in zip(last, operand.block, strict=True)]
    return operand._replace(array=_pad_to(operand.array, (0, *shape)))


def _pad_to(array: jax.Array, shape: Sequence[int]) -> jax.Array:
    missing = [max(0, n - m) for n, m in zip(shape, array.shape, strict=True)]
    return jnp.pad(array, [(0, n) for n in missing])


def add_coded_tile(
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
    """The sum so far and the product of one tile of codes, a piece of its inputs at a time.

    Args:
        x_smem: [M, N], the tile's inputs.
        words_smem: int32 [1, 2 bits, 256], 256 codes of each output.
        grid_smem: int32 [rows, 64], one row or more for equal runs of the inputs.
        total: float32 [64, M].
        bits: of a code.
        scale_dtype: of the grid.
        chunk: inputs of a piece.
        interpreted: whether JAX's interpreter runs this.
        lay_out: makes the weights [64, chunk] of a piece of its codes less their zeros and of its
            number; by default those are the weights.
    """
    vectors = [load_words(words_smem, k, interpreted) for k in range(bits)]
    pieces, pairs = x_smem.shape[1] // chunk, code_words(vectors, bits)
    for k in range(pieces):
        codes = operand(list(itertools.islice(pairs, 16 // pieces)), interpreted)
        row = grid_smem.at[k * grid_smem.shape[0] // pieces]
        grid = load(row, plgpu.Layout.WGMMA.reduce(1), interpreted)
        scales, offsets = scales_and_offsets(grid, bits, scale_dtype)
        # Exact: 2^bits + q and 2^bits + zero are integers of 8 bits or less, as is the difference.
        spread = jax.lax.broadcast_in_dim(offsets.astype(jnp.bfloat16), codes.shape, (0,))
        x_part = x_smem.at[:, pl.ds(k * chunk, chunk)]
        product = tensor_core(lay_out(codes - spread, k), x_part, interpreted)
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
        16 such sets, of 16 codes of 64 outputs each, as `operand` takes them.
    """
    of_set = rows_of_set(bits) // 8
    for pieces in fields_of(bits):
        for vector in range(of_set):
            yield pairs_of_field(vectors[vector::of_set], pieces, bits)


def load(ref, layout, interpreted: bool) -> jax.Array:
    """Shared memory to registers."""
    return ref[...] if interpreted else plgpu.layout_cast(ref[...], layout)


def load_words(ref, vector: int, interpreted: bool) -> jax.Array:
    """One set of 512 words of the "fragments" arrangement, int32 [2, 256] in WORDS.

    Args:
        ref: [1, 2 N, 256] in shared memory.
        vector: which of the N sets.
        interpreted: whether JAX's interpreter runs this.
    """
    return load(ref.at[0, pl.ds(2 * vector, 2)], WORDS, interpreted)


def operand(words: Sequence[jax.Array], interpreted: bool) -> jax.Array:
    """N sets of words of two bfloat16 as an operand of the tensor cores: bfloat16 [64, 16 N].

    Nothing moves: a thread's four words of a set are its share of 16 columns, the lower bfloat16 of
    a word in the lower column. Row r of a set is columns 2 r and 2 r + 1.
    """
    if interpreted:
        rows = from_fragments(jnp.stack(words).reshape(1, -1, 512))
        pairs = jax.lax.bitcast_convert_type(rows, jnp.bfloat16)
        return pairs.swapaxes(0, 1).reshape(OUTPUTS, -1)
    shape = (OUTPUTS, 16 * len(words))

    @plgpu.inline_mgpu(
        arg_types=(WORDS,) * len(words),
        return_type=plgpu.ShapeDtypeStruct(shape, jnp.bfloat16, layout=plgpu.Layout.WGMMA),
    )
    def convert(_, *sets):
        pair, layout = ir.VectorType.get((2,), ir.BF16Type.get()), mgpu.WGMMA_LAYOUT
        found = [
            mgpu.utils.bitcast(_element(one.registers.flat[0], position), pair)
            for one in sets
            for position in range(4)
        ]
        return mgpu.FragmentedArray(
            _registers=np.array(found, object).reshape(layout.registers_shape(shape)),
            _layout=layout,
            _is_signed=None,
        )

    # The decorator supplies the context and gives an array.
    return convert(*words)  # pyright: ignore[reportCallIssue, reportReturnType]


def words_of(operand: jax.Array, interpreted: bool) -> list[jax.Array]:
    """The words that `operand` took: bfloat16 [64, 16 N] back to N arrays int32 [2, 256]."""
    count = operand.shape[1] // 16
    if interpreted:
        pairs = operand.reshape(OUTPUTS, -1, 2).swapaxes(0, 1)
        words = to_fragments(jax.lax.bitcast_convert_type(pairs, jnp.int32))
        return list(words.reshape(count, 2, 256))
    one = plgpu.ShapeDtypeStruct((2, 256), jnp.int32, layout=WORDS)

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA,), return_type=[one] * count)
    def convert(_, array):
        i32 = ir.IntegerType.get_signless(32)
        words = [mgpu.utils.bitcast(register, i32) for register in array.registers.flat]
        four = ir.VectorType.get((4,), i32)
        vectors = [
            vector_dialect.from_elements(four, words[start : start + 4])
            for start in range(0, len(words), 4)
        ]
        return [
            mgpu.FragmentedArray(
                _registers=np.array([vector], object),
                _layout=mgpu.WGStridedFragLayout((2, 256), vec_size=4),
                _is_signed=True,
            )
            for vector in vectors
        ]

    # As above.
    return convert(operand)  # pyright: ignore[reportCallIssue, reportReturnType]


def _element(vector: ir.Value, position: int) -> ir.Value:
    """One word of a vector."""
    return vector_dialect.extract(
        vector, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([position])
    )


def tensor_core(left: jax.Array, x_ref, interpreted: bool) -> jax.Array:
    """left [64, N] in registers times x^T, x [M, N] in shared memory: float32 [64, M]."""
    if interpreted:  # the interpreter takes both operands from shared memory only
        return jnp.matmul(left, x_ref[...].T, preferred_element_type=jnp.float32)

    def multiply(sum_ref):
        plgpu.wgmma(sum_ref, left, x_ref.transpose((1, 0)))
        return sum_ref[...]

    return pl.run_scoped(
        multiply, plgpu.WGMMAAccumulatorRef((left.shape[0], x_ref.shape[0]), jnp.float32)
    )
