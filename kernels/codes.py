"""How the kernels store codes, scales and zeros in 32-bit words, and read them back.

A checkpoint's order would need values shuffled between lanes; this one needs a shift and a mask of
whole words. Inputs come in tiles of 256 (the last one is filled with zero codes); a tile is
`8 * bits` rows of words, whole registers of a TPU. Both 16-bit halves of a word hold the same
fields: field f of row r holds input f * 2R + 2r of the tile in the low half and the next input in
the high half, R being the rows of a set (all rows of the tile, or 8 with 3 bits). One shift and one
mask of a set therefore give 2R consecutive inputs as a block of 16-bit values, in the order in
which a TPU packs two rows into a register and a GPU's tensor core takes two columns.

Three bits have three sets of five fields each, and the sixteenth field is spread over bit 15 of
every half: bit i lies in set i. No value straddles a word and no bit is wasted.

GPUs read the same words in another order ("fragments"): 8 rows by 64 outputs become 512 words, of
which thread t of a warpgroup has words 4 t .. 4 t + 3, its share of a tensor core operand.

Invariant: `unpack_tiles`, `unpack_grid` and `from_fragments` give back every bit that their
counterparts stored.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from .packing import BIT_WIDTHS

TILE = 256
"""Inputs of a tile."""
GRID_SPAN = 1024
"""Inputs that the rows of a grid are padded to, so that blocks of rows never end early."""

Field = tuple[tuple[int, int, int, int], ...]
"""Where a field's bits lie: pieces (set, shift, mask, position)."""


def fields_of(bits: int) -> tuple[Field, ...]:
    """The fields of a tile's words, in the order of its inputs.

    A piece is read as `((word of the set) >> shift & mask) << position` and the pieces of a field
    are joined with "or"; shifts and masks are those of one 16-bit half.

    Raises:
        ValueError: for another number of bits.
    """
    if bits not in BIT_WIDTHS:
        raise ValueError(f"bits must be one of {BIT_WIDTHS}, not {bits}")
    if bits != 3:
        return tuple(((0, bits * f, 2**bits - 1, 0),) for f in range(16 // bits))
    # Five codes of 3 bits leave one bit of 16. The spare bits of three words are one code more, so
    # that three words hold 2 x 16 codes: 96 bits, all of them used.
    whole = tuple(((f // 5, 3 * (f % 5), 7, 0),) for f in range(15))
    return (*whole, ((0, 15, 1, 0), (1, 15, 1, 1), (2, 15, 1, 2)))


def rows_of_set(bits: int) -> int:
    """Rows of words per set of a tile; a tile has 3 sets with 3 bits, else one."""
    return 8 if bits == 3 else 8 * bits


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


def pairs_of_field(sets: Sequence[jax.Array], pieces: Field, bits: int) -> jax.Array:
    """Two codes of every word as two bfloat16 in a word: 2^bits + q, or q with 8 bits.

    Args:
        sets: words int32 of each set, of one shape, which is that of the result.
        pieces: a field, from `fields_of`.
        bits: 2, 3, 4 or 8.
    """
    if bits == 8:
        # 2^8 + q would need 8 bits of mantissa, bfloat16 has 7: these are converted.
        ((_, shift, _, _),) = pieces
        low = _bfloat16_bits((sets[0] >> shift) & np.int32(0xFF))
        high = _bfloat16_bits((sets[0] >> (shift + 16)) & np.int32(0xFF))
        return jax.lax.shift_right_logical(low, jnp.int32(16)) | high
    # A bfloat16 with exponent `bits` is 2^bits (1 + m / 2^7), m being its mantissa of 7 bits. The
    # code in the upper bits of the mantissa is m = q 2^(7 - bits), so the number is 2^bits + q:
    # nothing is rounded. 0x00010001 does the same to both halves.
    word = jnp.int32((127 + bits) << 7) * jnp.int32(0x00010001)
    for part, shift, mask, position in pieces:
        place = 7 - bits + position
        both = np.uint32(mask << place) * np.uint32(0x00010001)
        # Bits that one half shifts into the other lie outside the mask.
        word |= _shifted(sets[part], shift - place) & both.astype(np.int32)
    return word


def _shifted(words: jax.Array, right: int) -> jax.Array:
    if right == 0:
        return words
    if right > 0:
        return jax.lax.shift_right_logical(words, jnp.int32(right))
    return jax.lax.shift_left(words, jnp.int32(-right))


def _bfloat16_bits(codes: jax.Array) -> jax.Array:
    """The bfloat16 of integers below 256, exact, in the upper half of a word."""
    return jax.lax.bitcast_convert_type(codes.astype(jnp.float32), jnp.int32)


def pack_grid(scales: jax.Array, zeros: jax.Array, inputs: int) -> jax.Array:
    """Joins scales of 16 bits and zeros, both [G, O], to words int32 [rows, O].

    The scale has the lower 16 bits, the zero those above. One row for one group, else G rows raised
    to whole spans of 1024 inputs.
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


def scales_and_offsets(grid: jax.Array, bits: int, scale_dtype: str) -> tuple[jax.Array, jax.Array]:
    """float32 scales, and what to subtract from the values of `pairs_of_field`, of words of a grid.

    float16 has no place in a TPU's registers: it is taken apart, exactly, subnormal numbers too.
    """
    base = 0 if bits == 8 else 2**bits
    offsets = (jax.lax.shift_right_logical(grid, jnp.int32(16)) + jnp.int32(base)).astype(
        jnp.float32
    )
    if scale_dtype == "bfloat16":
        return jax.lax.bitcast_convert_type(grid << 16, jnp.float32), offsets
    # A float16 is m 2^(e - 25), m being its 10 bits of mantissa below a hidden one. Subnormal
    # numbers have no hidden bit and the e of the least normal ones, 1, though 0 is written.
    exponent = (grid >> 10) & jnp.int32(31)
    hidden = jnp.where(exponent > 0, jnp.int32(1 << 10), jnp.int32(0))
    mantissa = ((grid & jnp.int32(0x3FF)) | hidden).astype(jnp.float32)
    power = (jnp.maximum(exponent, 1) + jnp.int32(127 - 25)) << 23
    magnitude = mantissa * jax.lax.bitcast_convert_type(power, jnp.float32)
    negative = (grid & jnp.int32(1 << 15)) != 0
    return jnp.where(negative, -magnitude, magnitude), offsets


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
