"""Arrays that are read when they are placed, and only as far as a device of this process has them.

A checkpoint's tensors stand for themselves as `Later`: shape, dtype and where to read. A model made
of those costs nothing. `place` reads it, one stacked array after the other and of that one layer
after the other, straight into the memory that the device array keeps (on a CPU) or is copied from.
The invariant: the host holds what this process' devices hold, and one tensor beside it.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from numpy.typing import DTypeLike

from idp_jax.sharding import shardings

Index = tuple[slice, ...]
_ALIGNMENT = 64  # bytes, from which on XLA takes over host memory as it is


class Later:
    """An array that is read at every indexing.

    Attributes:
        shape, dtype: of what is read.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: DTypeLike,
        open: Callable[[], np.ndarray],
        finish: Callable[[np.ndarray], np.ndarray] = lambda part: part,
    ):
        """Nothing is read.

        Args:
            open: gives the array in its own shape, best as a map of its file.
            finish: makes the numbers that are asked for from a part of it, element by element.
        """
        self.shape, self.dtype = tuple(shape), np.dtype(dtype)
        self._open, self._finish = open, finish

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    @property
    def T(self) -> "Later":
        """The array with its axes the other way round."""
        return Later(self.shape[::-1], self.dtype, lambda: self._open().T, self._finish)

    def astype(self, dtype: DTypeLike) -> "Later":
        """The array in another type."""
        finish = lambda part: self._finish(part).astype(dtype)
        return Later(self.shape, dtype, self._open, finish)

    def parts(self, indices: Sequence[Any]) -> Iterator[np.ndarray]:
        """Some parts of it, for which it is opened once."""
        whole = self._open()
        for index in indices:
            yield self._finish(whole[index])

    def __getitem__(self, index: Any) -> np.ndarray:
        return next(self.parts([index]))


class Stacked:
    """Arrays of single layers as one, with a leading axis of layers.

    Attributes:
        shape, dtype: of the stack; the dtype holds the numbers of every layer.
    """

    def __init__(self, layers: Sequence[Later | np.ndarray]):
        self.layers = layers
        self.shape = (len(layers), *layers[0].shape)
        self.dtype = _common({layer.dtype for layer in layers})
        self.ndim = len(self.shape)


def _common(dtypes: set[np.dtype]) -> np.dtype:
    """One that holds the numbers of all."""
    try:
        return np.result_type(*dtypes)
    except TypeError:  # float16 and bfloat16: neither holds the other
        return np.dtype(np.float32)


def whole(tree):
    """A tree of such arrays as numpy arrays of their own memory."""

    def read(leaf) -> np.ndarray:
        if isinstance(leaf, np.ndarray):
            return leaf
        value = np.asarray(leaf[...])
        return value if value.flags.owndata and value.flags.c_contiguous else value.copy(order="C")

    return jax.tree.map(read, tree)


def place(tree, mesh: jax.sharding.Mesh | None, progress: Callable = iter):
    """A tree of such arrays (and numpy arrays) on its devices.

    Args:
        mesh: as of `sharding.shard`; None for one device.
        progress: wraps the iteration over the arrays.
    """
    leaves, structure = jax.tree.flatten(tree)
    places = [None] * len(leaves) if mesh is None else jax.tree.leaves(shardings(tree, mesh))
    pairs = list(zip(leaves, places, strict=True))
    return jax.tree.unflatten(structure, [_placed(*pair) for pair in progress(pairs)])


def _placed(leaf, sharding: NamedSharding | None) -> jax.Array:
    if sharding is None:
        (part,) = _read(leaf, [(slice(None),) * leaf.ndim])
        return _on_device(part, None)
    indices: Any = sharding.addressable_devices_indices_map(leaf.shape)
    # Devices that hold the same part are given one reading of it.
    known = {_bounds(index, leaf.shape): index for index in indices.values()}
    read = dict(zip(known, _read(leaf, list(known.values())), strict=True))
    parts, given = [], set()
    for device, index in indices.items():
        key = _bounds(index, leaf.shape)
        # Each has memory of its own: what is donated may be written to.
        parts.append(_on_device(read[key] if key not in given else read[key].copy(), device))
        given.add(key)
    array = jax.make_array_from_single_device_arrays(leaf.shape, sharding, parts)
    return jax.block_until_ready(array)  # else its parts would wait on the host for their turn


def _bounds(index: Index, shape: tuple[int, ...]) -> tuple[tuple[int, int, int], ...]:
    return tuple(part.indices(size) for part, size in zip(index, shape, strict=True))


def _read(leaf: Any, indices: list[Index]) -> list[np.ndarray]:
    """Parts of an array, each in memory of its own."""
    shapes = [tuple(len(range(*part)) for part in _bounds(index, leaf.shape)) for index in indices]
    buffers = [_empty(shape, leaf.dtype) for shape in shapes]
    if not isinstance(leaf, Stacked):
        _fill(leaf, indices, buffers)
        return buffers
    for number, layer in enumerate(leaf.layers):  # all layers are on every device
        _fill(layer, [index[1:] for index in indices], [buffer[number] for buffer in buffers])
    return buffers


def _fill(layer: Later | np.ndarray, indices: list[Index], buffers: list[np.ndarray]) -> None:
    parts = layer.parts(indices) if isinstance(layer, Later) else (layer[i] for i in indices)
    for buffer, part in zip(buffers, parts, strict=True):
        buffer[...] = part


def _empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Memory that XLA takes over without a copy."""
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def _on_device(part: np.ndarray, device: Any) -> jax.Array:
    # On a CPU the array keeps this memory, which nobody else writes to.
    return jax.device_put(part, device, may_alias=True)
