"""The layout that kernels multiply from, made once at load: a checkpoint's order would need values
shuffled between lanes, this one needs a shift and a mask of whole words.

Invariant: `restore(repack(...))` gives back every bit. Inputs come in tiles of 256 (the last one is
filled with zero codes); a tile is 8 * bits rows of words. Both 16-bit halves of a word hold the
same fields: field f of row r holds input f * 2R + 2r of the tile in the low half and the next input
in the high half, R being the rows of a set (all rows of the tile, or 8 with 3 bits). One shift and
one mask of a set therefore give 2R consecutive inputs as a block of 16-bit values, in the order in
which a TPU packs two rows into a register and a GPU's tensor core takes two columns.

GPUs read the same words in another order (`arrangement` "fragments"): 8 rows by 64 outputs become
512 words of which thread t of a warpgroup owns 4 t .. 4 t + 3, its share of a tensor core operand.

Three bits have three sets of five fields each, and the sixteenth field is spread over bit 15 of
every half: bit i lies in set i. No value straddles a word and no bit is wasted.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from .packing import BIT_WIDTHS, pack, unpack

TILE = 256
"""Inputs of a tile."""
GRID_SPAN = 1024
"""Inputs that the rows of `grid` are padded to, so that blocks of rows never end early."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["words", "grid", "order", "layer"],
    meta_fields=["bits", "inputs", "groups", "scale_dtype", "arrangement"],
)
@dataclasses.dataclass(frozen=True)
class KernelWeight:
    """A packed weight in the layout of the kernels.

    Attributes:
        words: int32 [..., T * 8 * bits, O] with T = ceil(I / 256) tiles of inputs; as "fragments"
            [..., ceil(O / 64), T * bits, 512].
        grid: int32 [..., rows, O], one word per group: the 16 bits of the scale below, the zero
            above them. One row for one group, else G rows raised to whole spans of 1024 inputs.
        order: int32 [..., I] or None: the inputs in the order of the words, where a checkpoint's
            groups are not runs of inputs (act-order).
        bits: 2, 3, 4 or 8.
        inputs: I.
        groups: G.
        scale_dtype: "float16" or "bfloat16".
        arrangement: "rows" (TPU) or "fragments" (GPU).
        layer: int32 scalar or None: `words` and `grid` are stacks of layers and this one is meant
            (stack.py).
    """

    words: jax.Array
    grid: jax.Array
    order: jax.Array | None
    bits: int
    inputs: int
    groups: int
    scale_dtype: str
    arrangement: str = "rows"
    layer: jax.Array | None = None

    @property
    def group_size(self) -> int:
        """Inputs of a group."""
        return self.inputs // self.groups

    @property
    def outputs(self) -> int:
        """Columns of the weight."""
        return self.grid.shape[-1]


def fields_of(bits: int) -> tuple[tuple[tuple[int, int, int, int], ...], ...]:
    """Where a field's bits lie: for every field, pieces (set, shift, mask, position).

    A piece is read as `((word of the set) >> shift & mask) << position` and the pieces of a field
    are joined with "or"; shifts and masks are those of one 16-bit half.

    Raises:
        ValueError: for another number of bits.
    """
    if bits not in BIT_WIDTHS:
        raise ValueError(f"bits must be one of {BIT_WIDTHS}, not {bits}")
    if bits != 3:
        return tuple(((0, bits * f, 2**bits - 1, 0),) for f in range(16 // bits))
    whole = tuple(((f // 5, 3 * (f % 5), 7, 0),) for f in range(15))
    return (*whole, ((0, 15, 1, 0), (1, 15, 1, 1), (2, 15, 1, 2)))


def rows_of_set(bits: int) -> int:
    """Rows of words per set of a tile; a tile has 3 sets with 3 bits, else one."""
    return 8 if bits == 3 else 8 * bits


def repack(
    words: jax.Array,
    scales: jax.Array,
    zeros: jax.Array,
    *,
    bits: int,
    group_index: jax.Array | None = None,
    arrangement: str = "rows",
) -> KernelWeight:
    """Turns a weight from the checkpoint's layout into the kernels'. Exact; can be jitted.

    Args:
        words: int32 [..., I * bits / 32, O], packed along the inputs (see packing.py).
        scales: float16 or bfloat16 [..., G, O].
        zeros: unsigned integers [..., G, O].
        bits: 2, 3, 4 or 8.
        group_index: int32 [..., I], the group of every input; every group must have I / G of them.
        arrangement: "rows" or "fragments", see the top of this file.

    Raises:
        ValueError: scales of another dtype, an unknown arrangement, or inputs that do not divide
            into the groups.
    """
    if scales.dtype not in (jnp.float16, jnp.bfloat16):
        raise ValueError(
            f"scales are {scales.dtype}, the kernels take float16 or bfloat16: cast them, or "
            "use backend xla"
        )
    if arrangement not in ("rows", "fragments"):
        raise ValueError(f"arrangement must be rows or fragments, not {arrangement}")
    if words.ndim > 2:
        one = functools.partial(repack, bits=bits, arrangement=arrangement)
        return jax.vmap(one)(words, scales, zeros, group_index=group_index)
    codes = unpack(words, bits)
    inputs, groups = codes.shape[0], scales.shape[0]
    if inputs % groups:
        raise ValueError(f"{inputs} inputs do not divide into {groups} groups: use backend xla")
    order = None
    if group_index is not None:
        order = jnp.argsort(group_index, stable=True).astype(jnp.int32)
        codes = codes[order]
    packed = pack_tiles(codes, bits)
    return KernelWeight(
        words=packed if arrangement == "rows" else to_fragments(packed),
        grid=pack_grid(scales, zeros, inputs),
        order=order,
        bits=bits,
        inputs=inputs,
        groups=groups,
        scale_dtype=scales.dtype.name,
        arrangement=arrangement,
    )


def restore(
    weight: KernelWeight,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Turns a weight back into the checkpoint's layout: words, scales, zeros and group_index."""
    if weight.grid.ndim > 2:
        return jax.vmap(restore)(weight)
    codes = codes_of(weight)
    scales, zeros = scales_and_zeros(weight)
    group_index = None
    if weight.order is not None:
        codes = jnp.zeros_like(codes).at[weight.order].set(codes)
        groups = jnp.arange(weight.inputs, dtype=jnp.int32) // weight.group_size
        group_index = jnp.zeros_like(groups).at[weight.order].set(groups)
    return pack(codes, weight.bits), scales, zeros, group_index


def codes_of(weight: KernelWeight) -> jax.Array:
    """Codes uint8 [I, O], in the order of the words."""
    words = weight.words
    if weight.arrangement == "fragments":
        words = from_fragments(words)[:, : weight.outputs]
    return unpack_tiles(words, weight.bits)[: weight.inputs]


def scales_and_zeros(weight: KernelWeight) -> tuple[jax.Array, jax.Array]:
    """Scales [G, O] in the checkpoint's dtype and zeros uint8 [G, O]."""
    return unpack_grid(weight.grid[: weight.groups], weight.scale_dtype)


def pack_grid(scales: jax.Array, zeros: jax.Array, inputs: int) -> jax.Array:
    """Joins scales of 16 bits and zeros, both [G, O], to words int32 [rows, O].

    One row for one group, else G rows raised to whole spans of 1024 inputs.
    """
    groups = scales.shape[0]
    bit_pattern = jax.lax.bitcast_convert_type(scales, jnp.uint16).astype(jnp.uint32)
    grid = bit_pattern | (zeros.astype(jnp.uint32) << 16)
    if groups > 1:
        per_span = max(1, GRID_SPAN // (inputs // groups))
        grid = jnp.pad(grid, ((0, -groups % per_span), (0, 0)))
    return jax.lax.bitcast_convert_type(grid, jnp.int32)


def unpack_grid(grid: jax.Array, scale_dtype: str) -> tuple[jax.Array, jax.Array]:
    """Reads what `pack_grid` wrote: scales [G, O] and zeros uint8 [G, O] of G rows."""
    words = jax.lax.bitcast_convert_type(grid, jnp.uint32)
    scales = jax.lax.bitcast_convert_type(words.astype(jnp.uint16), jnp.dtype(scale_dtype))
    return scales, (words >> 16).astype(jnp.uint8)


def pack_tiles(codes: jax.Array, bits: int) -> jax.Array:
    """Packs codes [I, O] of any integer dtype into words int32 [ceil(I / 256) * 8 * bits, O]."""
    codes = jnp.pad(codes.astype(jnp.uint32), ((0, -codes.shape[0] % TILE), (0, 0)))
    fields, rows = fields_of(bits), rows_of_set(bits)
    codes = codes.reshape(-1, len(fields), rows, 2, codes.shape[1])
    sets = [jnp.zeros((), jnp.uint32)] * (8 * bits // rows)
    for codes_of_field, pieces in zip(jnp.moveaxis(codes, 1, 0), fields, strict=True):
        for part, shift, mask, position in pieces:
            half = ((codes_of_field >> position) & jnp.uint32(mask)) << shift
            sets[part] = sets[part] | half[:, :, 0] | (half[:, :, 1] << 16)
    words = jnp.stack(sets, axis=1).reshape(-1, codes.shape[-1])
    return jax.lax.bitcast_convert_type(words, jnp.int32)


def unpack_tiles(words: jax.Array, bits: int) -> jax.Array:
    """Reads what `pack_tiles` wrote: uint8 codes [T * 256, O]."""
    rows, outputs = rows_of_set(bits), words.shape[1]
    words = jax.lax.bitcast_convert_type(words, jnp.uint32).reshape(-1, bits * 8, outputs)
    fields = []
    for pieces in fields_of(bits):
        field = jnp.zeros((), jnp.uint32)
        for part, shift, mask, position in pieces:
            of_set = words[:, part * rows : (part + 1) * rows]
            halves = jnp.stack([of_set >> shift, of_set >> (shift + 16)], axis=2)
            field = field | ((halves & jnp.uint32(mask)) << position)
        fields.append(field.astype(jnp.uint8))
    return jnp.stack(fields, axis=1).reshape(-1, outputs)


def to_fragments(words: jax.Array) -> jax.Array:
    """Rows of words [8 N, O] to fragments [ceil(O / 64), N, 512]."""
    # Thread 32 w + 4 a + b of a warpgroup holds outputs 16 w + a and 8 more, rows b and 4 more.
    words = jnp.pad(words, ((0, 0), (0, -words.shape[1] % 64)))
    split = words.reshape(-1, 2, 4, words.shape[1] // 64, 4, 2, 8)
    # [set, row / 4, b, block, w, output / 8, a] -> [block, set, w, a, b, row / 4, output / 8]
    return split.transpose(3, 0, 4, 6, 2, 1, 5).reshape(words.shape[1] // 64, -1, 512)


def from_fragments(fragments: jax.Array) -> jax.Array:
    """Fragments [B, N, 512] to rows of words [8 N, 64 B]."""
    blocks, sets, _ = fragments.shape
    split = fragments.reshape(blocks, sets, 4, 8, 4, 2, 2)
    return split.transpose(1, 5, 4, 0, 2, 6, 3).reshape(sets * 8, blocks * 64)
