"""Where every array lives: one table from logical axis names to mesh axes.

Every class with parameters says what their axes mean ("embed", "heads", ...) in its method
`logical_axes`; `RULES` alone says which mesh axis cuts which of them. A parameter that no class
says anything of is whole on every device. On one device, or outside `jax.set_mesh`, every function
here does nothing.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "model")
TENSOR_AXIS = "model"
"""The mesh axis that cuts single matrices, and with them the heads and the MLP."""
STORAGE_AXIS = "fsdp"
"""The mesh axis that cuts parameters only to be stored: every product gathers what it needs."""

# Along `embed`, the residual stream's side of every matrix, weights are cut only to be stored
# (ZeRO-3): XLA gathers them for each product. Activations keep that side whole (`embed_activation`)
# and are cut over their batch by the same devices, so the two never meet in one array.
RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "time": None,
    "kept_time": TENSOR_AXIS,  # of activations that wait for the backward pass
    "layers": None,
    "embed": "fsdp",
    "embed_activation": None,
    "heads": TENSOR_AXIS,
    "kv_heads": TENSOR_AXIS,
    "ffw": TENSOR_AXIS,
    "vocab": TENSOR_AXIS,
    "groups": None,
    "rank": None,
    "rows": TENSOR_AXIS,  # outputs of matrices while they are compressed
}


def make_mesh(shape: dict[str, int] | None = None, devices=None) -> jax.sharding.Mesh:
    """A mesh with the axes data, fsdp and model.

    Args:
        shape: sizes by axis; missing axes are 1, and one axis may be -1 (all devices that are
            left). None puts every device on `data`.

    Raises:
        ValueError: an unknown axis, or sizes that do not use every device.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = {"data": -1} if shape is None else dict(shape)
    unknown = set(shape) - set(MESH_AXES)
    if unknown:
        raise ValueError(
            f"unknown mesh axis {sorted(unknown)[0]!r}; the axes are {', '.join(MESH_AXES)}"
        )
    sizes = [shape.get(axis, 1) for axis in MESH_AXES]
    known = 1
    for size in sizes:
        known *= size if size > 0 else 1
    if sizes.count(-1) == 1 and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
        known = len(devices)
    if known != len(devices) or min(sizes) < 1:
        raise ValueError(
            f"mesh {dict(zip(MESH_AXES, sizes, strict=True))} does not use {len(devices)} devices; "
            "its sizes must multiply to that number"
        )
    return jax.make_mesh(sizes, MESH_AXES, (AxisType.Auto,) * 3, devices=devices)


def spec(names: tuple[str | None, ...], shape: tuple[int, ...], mesh) -> PartitionSpec:
    """The partition of an array whose axes have these logical names.

    An axis whose length its mesh axes do not divide stays whole on every device (three kv heads on
    a model axis of two, say).
    """

    def rule(name: str | None, length: int):
        count = 1 if name is None else parts(name, mesh.shape)
        return None if name is None or count == 1 or length % count else RULES[name]

    return PartitionSpec(*(rule(*pair) for pair in zip(names, shape, strict=True)))


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Pins an activation to the partition of its logical axes; nothing happens outside a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, spec(names, x.shape, mesh))


def constrain_parts(node, names: Mapping[str, Any]):
    """Pins the parameters of one part to what its `logical_axes` says; as `constrain`."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return node
    places = [
        spec(meant or (None,) * leaf.ndim, leaf.shape, mesh)
        for _, leaf, meant in named_axes(node, names)
    ]
    places = jax.tree.unflatten(jax.tree.structure(node), places)
    return jax.lax.with_sharding_constraint(node, places)


def parts(name: str, sizes: Mapping[str, int]) -> int:
    """How many parts a logical axis is cut into.

    Args:
        name: one of `RULES`.
        sizes: of the mesh axes (`mesh.shape`).
    """
    rule = RULES[name]
    axes = (rule,) if isinstance(rule, str) else (rule or ())
    return math.prod(sizes[axis] for axis in axes)


def declared_axes(tree) -> Iterator[tuple[tuple, jax.Array, tuple[str | None, ...] | None]]:
    """Every parameter of a model, an adapter, or an optimiser state over them.

    A class says what the axes of its parameters mean in `logical_axes()`: a mapping from its
    attributes to names of axes (a tuple), or for a part with parameters of its own to that part's
    mapping. Weights take as arguments what their inputs and outputs mean, which the block that
    holds them knows. An optimiser state holds trees of the same classes, so it needs nothing more.

    Returns:
        In the order of the tree's leaves: path, parameter, and the names of its axes, or None where
        no class names them.
    """
    declares = lambda node: hasattr(node, "logical_axes")
    for path, node in jax.tree_util.tree_flatten_with_path(tree, is_leaf=declares)[0]:
        names = node.logical_axes() if declares(node) else {}
        for inner, leaf, meant in named_axes(node, names):
            yield (*path, *inner), leaf, meant


def named_axes(
    node, names: Mapping[str, Any]
) -> Iterator[tuple[tuple, jax.Array, tuple[str | None, ...] | None]]:
    """The parameters of one part with what its `logical_axes` says; as `declared_axes`."""
    is_variable = lambda node: isinstance(node, nnx.Variable)
    flatten = jax.tree_util.tree_flatten_with_path
    for path, parameter in flatten(node, is_leaf=is_variable)[0]:
        found = _lookup(names, path)
        value = parameter.get_value() if is_variable(parameter) else parameter
        for rest, leaf in flatten(value)[0]:
            yield (*path, *rest), leaf, _stacked(_lookup(found, rest), leaf.ndim)


def _lookup(names, path: tuple):
    for key in path:
        word = getattr(key, "name", getattr(key, "key", getattr(key, "idx", None)))
        # Only an exact path counts: an `up` inside a part that its parent does not name is not
        # the MLP's.
        names = names.get(word) if isinstance(names, Mapping) else None
    return names


def _stacked(names, ndim: int) -> tuple[str | None, ...] | None:
    """Names of all axes, those of layers in front where a parameter is a stack of them."""
    if names is None or isinstance(names, Mapping) or len(names) > ndim:
        return None
    return ("layers",) * (ndim - len(names)) + tuple(names)


def batch_parts(mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh | None) -> int:
    """How many parts a batch is cut into: its rows must be a multiple of that."""
    return 1 if mesh is None or mesh.empty else parts("batch", mesh.shape)


def filled_rows(rows: int) -> int:
    """`rows`, or as many more as the mesh at work can share evenly; for batches that are filled."""
    count = batch_parts(jax.sharding.get_abstract_mesh())
    return -(-rows // count) * count


def shardings(tree, mesh: jax.sharding.Mesh) -> Any:
    """A NamedSharding for every array of a model, an adapter or an optimiser state over them."""
    places = [
        NamedSharding(mesh, spec(names or (None,) * leaf.ndim, leaf.shape, mesh))
        for _, leaf, names in declared_axes(tree)
    ]
    return jax.tree.unflatten(jax.tree.structure(tree), places)


def shard(tree, mesh: jax.sharding.Mesh | None):
    """Places a model or an adapter on a mesh; without a mesh it is returned as it is.

    In a job of several processes each passes the whole tree and keeps its own part.
    """
    if mesh is None:
        return tree
    return jax.tree.map(_place, tree, shardings(tree, mesh))


class Share(NamedTuple):
    """What the devices of one process hold of a batch.

    Attributes:
        rows: int [R], the numbers of the rows, rising.
        count: of all rows.
    """

    rows: np.ndarray
    count: int


def share(count: int, mesh: jax.sharding.Mesh | None) -> Share | None:
    """This process's share of a batch of so many rows; None where it is the whole batch."""
    if mesh is None or jax.process_count() == 1:
        return None
    places = _batch_sharding(count, mesh).addressable_devices_indices_map((count,)).values()
    return Share(np.unique([np.arange(count)[index] for index in places if index]), count)


def shard_batch(batch, mesh: jax.sharding.Mesh | None, share: Share | None = None):
    """Places host arrays [B, ...] with the batch cut over `data` and `fsdp`.

    Args:
        share: of which the arrays are the rows, [R, ...]; by default every process of a job passes
            the whole batch and keeps its own rows.

    Raises:
        ValueError: the rows do not divide over the mesh.
    """
    if mesh is None:
        return jax.tree.map(jax.numpy.asarray, batch)
    if share is None:
        return jax.tree.map(lambda x: _place(x, _batch_sharding(x.shape[0], mesh)), batch)
    sharding, numbers = _batch_sharding(share.count, mesh), np.arange(share.count)

    def place(x):
        def held(index):
            return np.asarray(x)[np.searchsorted(share.rows, numbers[index[0]])]

        return jax.make_array_from_callback((share.count, *x.shape[1:]), sharding, held)

    return jax.tree.map(place, batch)


def _batch_sharding(rows: int, mesh: jax.sharding.Mesh) -> NamedSharding:
    count = parts("batch", mesh.shape)
    if rows % count:
        raise ValueError(
            f"a batch of {rows} rows does not divide over data x fsdp = {count} devices; "
            f"choose a multiple of {count}"
        )
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def _place(x, sharding: NamedSharding) -> jax.Array:
    if sharding.is_fully_addressable:
        return jax.device_put(x, sharding)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: np.asarray(x)[index])
