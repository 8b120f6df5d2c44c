"""2:4 sparse weights as the kernels read them.

They are the two kept values of every four inputs, and where these stood. Invariant:
`to_dense(from_dense(w))` is w, and `to_codes(from_codes(...))` gives back the codes, bit for bit.

A quad is four consecutive inputs of one output. The first kept values of all quads come before the
second ones ([2, quads, O]); a quad's two positions are one code of 4 bits, first + 4 * second with
first < second, eight codes to a word: in a tile of 64 quads (256 inputs), field f of row r is quad
8 f + r, so that one shift and one mask give eight quads in a row.

Values are bfloat16 (9/16 of the bytes of the dense matrix) or quantised codes. The latter are
packed as in codes.py, in tiles of 512 inputs: the first values of their 128 quads, then the second
ones; a group has one scale and zero, and a dropped weight has q = zero.

GPUs read another order (`arrangement` "fragments"): the first value of a quad is followed by its
second one. Two bfloat16 values make a word, the first one below; codes are packed in this order, so
that two of a quad become such a word. Words of values, like those of positions, are put in the
order of `codes.to_fragments`: what a thread needs of eight rows by 64 outputs is one vector of four
words.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.core import Tracer

from ..codes import (
    from_fragments,
    pack_grid,
    pack_tiles,
    to_fragments,
    unpack_grid,
    unpack_tiles,
)
from ..packing import pack, unpack

QUADS = 64
"""Quads of a tile of positions: 256 inputs, 8 rows of words."""
CODED_QUADS = 128
"""Quads of a tile of quantised values: 512 inputs."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["values", "positions", "grid", "layer"],
    meta_fields=["inputs", "bits", "groups", "arrangement"],
)
@dataclasses.dataclass(frozen=True)
class SparseWeight:
    """A 2:4 sparse weight.

    Attributes:
        values: bfloat16 [..., 2, Q, O], Q quads raised to whole tiles; with `bits` words int32
            [..., Q / 128 * 8 * bits, O]; as "fragments" words int32 [O / 64, Q / 8, 512], or
            with `bits` [O / 64, Q / 128 * bits, 512].
        positions: int32 [..., Q / 8, O]; as "fragments" [O / 64, Q / 64, 512].
        grid: None, or with `bits` int32 [..., rows, O]: a group's float16 scale in the lower 16
            bits, its zero above; one row, or G rows raised to whole spans of 1024 inputs.
        inputs: I.
        bits: None for bfloat16 values, else 2, 3, 4 or 8.
        groups: G.
        arrangement: "rows" or "fragments" (GPU).
        layer: int32 scalar or None: the arrays are stacks of layers and this one is meant
            (stack.py).
    """

    values: jax.Array
    positions: jax.Array
    grid: jax.Array | None
    inputs: int
    bits: int | None = None
    groups: int = 1
    arrangement: str = "rows"
    layer: jax.Array | None = None

    @property
    def outputs(self) -> int:
        """Columns of the weight."""
        if self.arrangement == "fragments":
            return 64 * self.positions.shape[-3]
        return self.positions.shape[-1]

    @property
    def axes(self) -> dict[str, tuple[int | None, int]]:
        """See weight.py."""
        outputs = -3 if self.arrangement == "fragments" else -1
        axes: dict[str, tuple[int | None, int]] = {
            "values": (-2, outputs),
            "positions": (-2, outputs),
        }
        if self.grid is not None:
            axes["grid"] = (None if self.groups == 1 else -2, -1)
        return axes

    @property
    def tile(self) -> tuple[int, int]:
        """See weight.py."""
        quads = QUADS if self.bits is None else CODED_QUADS
        return 4 * quads, 64 if self.arrangement == "fragments" else 1

    @property
    def group_size(self) -> int:
        """Inputs of a group."""
        return self.inputs // self.groups


def from_dense(weights: jax.Array, *, arrangement: str = "rows") -> SparseWeight:
    """Compresses a 2:4 sparse matrix; can be jitted, then without the check of the pattern.

    Args:
        weights: bfloat16 [I, O] with at most two non-zeros in every four consecutive inputs.
        arrangement: "rows" or "fragments", see the top of this file.

    Raises:
        ValueError: another dtype, inputs that are no multiple of 4, more than two non-zeros, an
            unknown arrangement, or fragments of outputs that are no multiple of 64.
    """
    _check_arrangement(arrangement, weights.shape[1])
    if weights.dtype != jnp.bfloat16:
        raise ValueError(f"weights are {weights.dtype}: 2:4 values are stored as bfloat16")
    kept, positions = _split_quads(weights, weights != 0)
    kept = jnp.pad(kept, ((0, 0), (0, -kept.shape[1] % QUADS), (0, 0)))
    words = _pack_positions(positions, QUADS)
    if arrangement == "fragments":
        pairs = jax.lax.bitcast_convert_type(jnp.moveaxis(kept, 0, -1), jnp.int32)
        kept, words = to_fragments(pairs), to_fragments(words)
    return SparseWeight(kept, words, None, weights.shape[0], arrangement=arrangement)


def from_codes(
    words: jax.Array,
    scales: jax.Array,
    zeros: jax.Array,
    *,
    bits: int,
    arrangement: str = "rows",
) -> SparseWeight:
    """Compresses a quantised matrix whose dropped weights have the code of zero.

    Args:
        words: int32 [I * bits / 32, O], the checkpoint's layout (see packing.py).
        scales: float16 [G, O].
        zeros: unsigned integers [G, O].
        bits: 2, 3, 4 or 8.
        arrangement: "rows" or "fragments", see the top of this file.

    Raises:
        ValueError: another dtype of scales, I no multiple of 4 G, more than two codes in a quad
            that differ from zero, an unknown arrangement, or fragments of outputs that are no
            multiple of 64.
    """
    _check_arrangement(arrangement, words.shape[1])
    if scales.dtype != jnp.float16:
        raise ValueError(f"scales are {scales.dtype}: the kernels take float16")
    codes = unpack(words, bits)
    inputs, groups = codes.shape[0], scales.shape[0]
    if inputs % (4 * groups):
        raise ValueError(f"{inputs} inputs do not divide into {groups} groups of whole quads")
    every = jnp.repeat(zeros.astype(jnp.uint8), inputs // groups, 0)
    kept, positions = _split_quads(codes, codes != every)
    kept = jnp.pad(kept, ((0, 0), (0, -kept.shape[1] % CODED_QUADS), (0, 0)))
    tile = 1 if arrangement == "fragments" else CODED_QUADS
    tiles = kept.reshape(2, -1, tile, kept.shape[-1]).swapaxes(0, 1)
    values = pack_tiles(tiles.reshape(-1, kept.shape[-1]), bits)
    words = _pack_positions(positions, CODED_QUADS)
    if arrangement == "fragments":
        values, words = to_fragments(values), to_fragments(words)
    grid = pack_grid(scales, zeros, inputs)
    return SparseWeight(values, words, grid, inputs, bits, groups, arrangement)


def to_dense(weight: SparseWeight) -> jax.Array:
    """The matrix [..., I, O]: bfloat16, or float32 for quantised values."""
    if _layers(weight):
        return jax.vmap(to_dense)(weight)
    if weight.bits is None:
        kept = weight.values
        if weight.arrangement == "fragments":
            pairs = jax.lax.bitcast_convert_type(from_fragments(kept), jnp.bfloat16)
            kept = jnp.moveaxis(pairs, -1, 0)
        return _join_quads(kept, jnp.bfloat16(0), weight)
    words, scales, zeros = to_codes(weight)
    codes = (
        unpack(words, weight.bits).astype(jnp.float32).reshape(weight.groups, -1, weight.outputs)
    )
    centred = codes - zeros.astype(jnp.float32)[:, None]
    return (scales.astype(jnp.float32)[:, None] * centred).reshape(-1, weight.outputs)


def to_codes(weight: SparseWeight) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Words, scales and zeros, as `from_codes` took them, of all layers."""
    if _layers(weight):
        return jax.vmap(to_codes)(weight)
    assert weight.bits is not None and weight.grid is not None
    scales, zeros = unpack_grid(weight.grid[: weight.groups], "float16")
    words, tile = weight.values, CODED_QUADS
    if weight.arrangement == "fragments":
        words, tile = from_fragments(words), 1
    codes = unpack_tiles(words, weight.bits)
    codes = codes.reshape(-1, 2, tile, weight.outputs).swapaxes(0, 1)
    codes = codes.reshape(2, -1, weight.outputs)
    every = jnp.repeat(zeros, weight.group_size // 4, 0)
    codes = _join_quads(codes, every, weight)
    return pack(codes, weight.bits), scales, zeros


def _layers(weight: SparseWeight) -> bool:
    return weight.positions.ndim > (3 if weight.arrangement == "fragments" else 2)


def _check_arrangement(arrangement: str, outputs: int) -> None:
    if arrangement not in ("rows", "fragments"):
        raise ValueError(f"arrangement must be rows or fragments, not {arrangement}")
    if arrangement == "fragments" and outputs % 64:
        raise ValueError(f"{outputs} outputs are no multiple of 64: arrange them as rows")


def _split_quads(matrix: jax.Array, kept: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Kept entries [2, I / 4, O] and their positions int32, the first below the second."""
    if matrix.shape[0] % 4:
        raise ValueError(f"{matrix.shape[0]} inputs are no multiple of 4")
    kept = kept.reshape(-1, 4, matrix.shape[1])
    if not isinstance(kept, Tracer) and int(kept.sum(1).max()) > 2:
        raise ValueError("more than 2 of 4 consecutive inputs are not zero: prune to 2:4 first")
    # Kept entries first, each kind in its order; then the two chosen in the order of inputs.
    positions = jnp.sort(jnp.argsort(~kept, axis=1, stable=True)[:, :2], axis=1)
    entries = jnp.take_along_axis(matrix.reshape(kept.shape), positions, axis=1)
    return entries.swapaxes(0, 1), positions.swapaxes(0, 1).astype(jnp.int32)


def _join_quads(kept: jax.Array, rest: jax.Array, weight: SparseWeight) -> jax.Array:
    """[2, Q, O] to [I, O], `rest` (a scalar or [quads, O]) where nothing was kept."""
    quads = weight.inputs // 4
    codes = _unpack_positions(weight)[:quads]
    first, second = codes & 3, codes >> 2
    planes = [
        jnp.where(first == p, kept[0, :quads], jnp.where(second == p, kept[1, :quads], rest))
        for p in range(4)
    ]
    return jnp.stack(planes, axis=1).reshape(-1, weight.outputs)


def _pack_positions(positions: jax.Array, multiple: int) -> jax.Array:
    codes = (positions[0] + 4 * positions[1]).astype(jnp.uint32)
    # Quads that only fill the last tile keep nothing, whichever inputs they name: 0 and 1.
    codes = jnp.pad(codes, ((0, -codes.shape[0] % multiple), (0, 0)), constant_values=4)
    fields = codes.reshape(-1, 8, 8, codes.shape[1])
    words = fields << (4 * jnp.arange(8, dtype=jnp.uint32)).reshape(1, 8, 1, 1)
    words = words.sum(axis=1, dtype=jnp.uint32).reshape(-1, codes.shape[1])
    return jax.lax.bitcast_convert_type(words, jnp.int32)


def _unpack_positions(weight: SparseWeight) -> jax.Array:
    """Position codes uint8 [Q, O]."""
    words = weight.positions
    if weight.arrangement == "fragments":
        words = from_fragments(words)
    words = jax.lax.bitcast_convert_type(words, jnp.uint32)
    words = words.reshape(-1, 1, 8, weight.outputs)
    fields = words >> (4 * jnp.arange(8, dtype=jnp.uint32)).reshape(1, 8, 1, 1)
    return (fields & 15).astype(jnp.uint8).reshape(-1, weight.outputs)
