"""The product with a packed weight on Hopper GPUs, few rows of x at a time.

Invariant: codes become weights in registers only. The tensor cores compute y^T = W^T x^T: 64
outputs by the rows of x, with W^T taken from registers, where a word of the "fragments" arrangement
already is where it is needed: its two halves become two neighbouring bfloat16 of an operand with
one shift and one mask (the trick with the exponent is that of pallas_tpu.py). Subtracting the zero
from such a value is exact; the float32 sums of a group are scaled. x in float32 goes as three
bfloat16 parts.

A block of the grid takes 64 outputs and a share of the inputs, so that small matrices fill the
machine; shares are summed outside. Many rows and the gradient expand the weight in XLA (config.py).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith
from jaxlib.mlir.dialects import vector as vector_dialect

from ..frozen import frozen_product
from . import config, xla
from .layout import TILE, KernelWeight, fields_of, from_fragments, rows_of_set, unpack_tiles
from .pallas_tpu import device_kind, scales_and_offsets

_OUTPUTS = 64


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
    if x.dtype == jnp.bfloat16:
        return _multiply(x, weight, interpret).astype(x.dtype)
    parts, rest = [], x
    for _ in range(3):
        # Not `astype` twice, which XLA may take for nothing.
        parts.append(jax.lax.reduce_precision(rest, 8, 7))
        rest = rest - parts[-1]
    y = _multiply(jnp.concatenate(parts).astype(jnp.bfloat16), weight, interpret)
    return y.reshape(3, x.shape[0], weight.outputs).sum(0)


def _gradient(upstream: jax.Array, weight: KernelWeight, interpret) -> jax.Array:
    del interpret
    like = jnp.zeros((upstream.shape[0], weight.inputs), upstream.dtype)
    return jax.vjp(lambda x: xla.multiply(x, weight), like)[1](upstream)[0]


_product = frozen_product(_value, _gradient)


def _multiply(x: jax.Array, weight: KernelWeight, interpret) -> jax.Array:
    """x bfloat16 [M, I] times the weight: float32 [M, O]."""
    count, tiles = x.shape[0], -(-weight.inputs // TILE)
    blocks = -(-weight.outputs // _OUTPUTS)
    rows, shares, stages = config.gpu_sizes(
        device_kind(), weight.bits, weight.inputs, weight.outputs, count
    )
    row_blocks = -(-count // rows)
    steps = -(-tiles // shares)
    words, grid = weight.words.reshape(blocks, -1, 256), weight.grid
    if interpret is not None:
        # Outside an array the hardware reads zeros, the interpreter fails.
        x = _pad_to(x, row_blocks * rows, steps * shares * TILE)
        words = _pad_to(words, blocks, steps * shares * 2 * weight.bits, 256)
        grid = _pad_to(grid, max(grid.shape[0], steps * shares * 8), blocks * _OUTPUTS)
    transposed = plgpu.kernel(
        functools.partial(
            _body,
            weight=weight,
            rows=rows,
            steps=steps,
            stages=stages,
            interpreted=interpret is not None,
        ),
        out_type=jax.ShapeDtypeStruct((shares, blocks * _OUTPUTS, row_blocks * rows), jnp.float32),
        grid=(blocks, row_blocks, shares),
        grid_names=("outputs", "rows", "share"),
        scratch_types=[plgpu.SMEM((_OUTPUTS, rows), jnp.float32)],
        interpret=interpret,
    )(x, words, grid)
    return transposed.sum(0)[: weight.outputs, :count].T


def _body(
    x_gmem,
    words_gmem,
    grid_gmem,
    y_gmem,
    y_smem,
    *,
    weight: KernelWeight,
    rows: int,
    steps: int,
    stages: int,
    interpreted: bool,
):
    block, row_block, share = (jax.lax.axis_index(name) for name in ("outputs", "rows", "share"))
    chunk = TILE if weight.groups == 1 else min(TILE, weight.group_size)
    swizzle = min(128, 2 * chunk)
    grid_rows = TILE // chunk if weight.groups > 1 else 1
    first = share * steps

    def grid_block(k):
        if weight.groups == 1:
            return 0, block
        return jax.lax.div((first + k) * TILE, max(TILE, weight.group_size)), block

    zero = jnp.zeros((_OUTPUTS, rows), jnp.float32)
    if not interpreted:
        zero = plgpu.layout_cast(zero, plgpu.Layout.WGMMA)
    total = plgpu.emit_pipeline(
        functools.partial(_add_tile, weight=weight, chunk=chunk, interpreted=interpreted),
        grid=(steps,),
        in_specs=[
            plgpu.BlockSpec(
                (rows, TILE),
                lambda k: (row_block, first + k),
                transforms=(
                    plgpu.TilingTransform((8, swizzle // 2)),
                    plgpu.SwizzleTransform(swizzle),
                ),
            ),
            plgpu.BlockSpec((1, 2 * weight.bits, 256), lambda k: (block, first + k, 0)),
            plgpu.BlockSpec((grid_rows, _OUTPUTS), grid_block),
        ],
        max_concurrent_steps=stages,
        init_carry=zero,
    )(x_gmem, words_gmem, grid_gmem)
    y_smem[...] = total
    plgpu.commit_smem()
    outputs, columns = pl.ds(block * _OUTPUTS, _OUTPUTS), pl.ds(row_block * rows, rows)
    plgpu.copy_smem_to_gmem(y_smem, y_gmem.at[share, outputs, columns])
    plgpu.wait_smem_to_gmem(0)


def _add_tile(
    _,
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
    words = _load(words_smem.at[0], _words_layout(2 * weight.bits), interpreted)
    pieces = (_codes_interpreted if interpreted else _codes)(words, weight.bits, chunk)
    for k, codes in enumerate(pieces):
        grid = _load(grid_smem.at[k], plgpu.Layout.WGMMA.reduce(1), interpreted)
        scales, offsets = scales_and_offsets(grid, weight)
        spread = jax.lax.broadcast_in_dim(offsets.astype(jnp.bfloat16), codes.shape, (0,))
        x_part = x_smem.at[:, pl.ds(k * chunk, chunk)]
        product = _tensor_core(codes - spread, x_part, interpreted)
        total += product * jax.lax.broadcast_in_dim(scales, product.shape, (0,))
    return total


def _pad_to(array: jax.Array, *shape: int) -> jax.Array:
    return jnp.pad(array, [(0, n - m) for n, m in zip(shape, array.shape, strict=True)])


def _load(ref, layout, interpreted: bool) -> jax.Array:
    # The interpreter has no layouts.
    return ref[...] if interpreted else plgpu.load(ref, (), layout=layout)


def _tensor_core(left: jax.Array, x_ref, interpreted: bool) -> jax.Array:
    """left [64, N] in registers times x^T, x [M, N] in shared memory: float32 [64, M]."""
    if interpreted:  # the interpreter takes both operands from shared memory only
        return jnp.matmul(left, x_ref[...].T, preferred_element_type=jnp.float32)

    def multiply(sum_ref):
        plgpu.wgmma(sum_ref, left, plgpu.transpose_ref(x_ref, (1, 0)))
        return sum_ref[...]

    return pl.run_scoped(
        multiply, plgpu.WGMMAAccumulatorRef((left.shape[0], x_ref.shape[0]), jnp.float32)
    )


def _words_layout(rows: int):
    return plgpu.Layout.WG_STRIDED((rows, 256), vec_size=4)


def _codes(words: jax.Array, bits: int, chunk: int) -> list[jax.Array]:
    """One tile of words to bfloat16 codes, 2^bits + q (q with 8 bits), as pieces [64, chunk]."""
    piece = plgpu.ShapeDtypeStruct((_OUTPUTS, chunk), jnp.bfloat16, layout=plgpu.Layout.WGMMA)

    @plgpu.inline_mgpu(
        arg_types=(_words_layout(words.shape[0]),), return_type=[piece] * (TILE // chunk)
    )
    def convert(_, packed):
        registers = _registers(packed.registers.flatten(), bits)
        layout = mgpu.WGMMA_LAYOUT
        return [
            mgpu.FragmentedArray(
                _registers=np.array(part, object).reshape(layout.registers_shape(piece.shape)),
                _layout=layout,
                _is_signed=None,
            )
            for part in np.array_split(np.array(registers, object), TILE // chunk)
        ]

    return convert(words)  # pyright: ignore[reportCallIssue] the decorator supplies the context


def _registers(packed, bits: int) -> list[ir.Value]:
    """Registers of two bfloat16, in the order of inputs (16 at a time) and of a thread's share.

    `packed` holds a vector of 4 words for every 8 rows of the tile.
    """
    i32 = ir.IntegerType.get_signless(32)
    vectors_of_set = rows_of_set(bits) // 8
    registers = []
    for pieces in fields_of(bits):
        for vector in range(vectors_of_set):
            for element in range(4):
                words = [
                    _element(packed[part * vectors_of_set + vector], element)
                    for part in range(len(packed) // vectors_of_set)
                ]
                registers.append(_pair(words, pieces, bits, i32))
    return registers


def _element(vector: ir.Value, position: int) -> ir.Value:
    return vector_dialect.extract(
        vector, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([position])
    )


def _pair(words: list[ir.Value], pieces, bits: int, i32: ir.Type) -> ir.Value:
    pair = ir.VectorType.get((2,), ir.BF16Type.get())
    if bits == 8:
        ((_, shift, mask, _),) = pieces
        halves = []
        for place in (shift, shift + 16):
            field = arith.andi(arith.shrui(words[0], mgpu.c(place, i32)), mgpu.c(mask, i32))
            exact = mgpu.utils.bitcast(arith.uitofp(ir.F32Type.get(), field), i32)
            halves.append(exact)
        low = arith.shrui(halves[0], mgpu.c(16, i32))
        return mgpu.utils.bitcast(arith.ori(low, halves[1]), pair)
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
    return mgpu.utils.bitcast(result, pair)


def _codes_interpreted(words: jax.Array, bits: int, chunk: int) -> list[jax.Array]:
    """What `_codes` computes, for JAX's interpreter, which knows no registers."""
    codes = unpack_tiles(from_fragments(words.reshape(1, bits, 512)), bits).astype(jnp.bfloat16)
    codes = codes + jnp.bfloat16(0 if bits == 8 else 2**bits)
    return [codes[start : start + chunk].T for start in range(0, TILE, chunk)]
