"""Where every array lives: one table from logical axis names to mesh axes.

Parameters, packed words and activations all name their axes by what they mean ("embed", "heads",
...); `RULES` alone says which mesh axis
cuts which of them. On one device, or outside `jax.set_mesh`, every function here does nothing.
"""

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "model")

RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "time": None,
    "layers": None,
    "embed": "fsdp",
    "embed_activation": None,
    "heads": "model",
    "kv_heads": "model",
    "ffw": "model",
    "vocab": "model",
    "groups": None,
    "rank": None,
    "rows": "model",  # outputs of matrices while they are compressed
}

# The logical axes of every matrix [in, out]; biases and scales follow their matrix.
WEIGHT_AXES = {
    "q": ("embed", "heads"),
    "k": ("embed", "kv_heads"),
    "v": ("embed", "kv_heads"),
    "o": ("heads", "embed"),
    "gate": ("embed", "ffw"),
    "up": ("embed", "ffw"),
    "down": ("ffw", "embed"),
    "head": ("embed", "vocab"),
    "project_in": (None, "embed"),
    "project_out": ("embed", None),
    "embedding": ("vocab", "embed"),
}


def make_mesh(shape: dict[str, int] | None = None, devices=None) -> jax.sharding.Mesh:
    """A mesh with the axes data, fsdp and model.

    Args:
        shape: sizes by axis; missing axes are 1, and one axis may be -1 (all devices that are
            left).
            None puts every device on `data`.

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
    a
    model axis of two, say).
    """
    parts = []
    for name, length in zip(names, shape, strict=True):
        rule = RULES[name] if name is not None else None
        axes = (rule,) if isinstance(rule, str) else (rule or ())
        size = 1
        for axis in axes:
            size *= mesh.shape[axis]
        parts.append(rule if size > 1 and length % size == 0 else None)
    return PartitionSpec(*parts)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Pins an activation to the partition of its logical axes; nothing happens outside a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, spec(names, x.shape, mesh))


def _axes_of(path: tuple, leaf: jax.Array) -> tuple[str | None, ...]:
    """Logical axes of one parameter, from the names on the way to it."""
    keys = [str(getattr(key, "name", getattr(key, "key", key))) for key in path]
    matrix = next((key for key in keys if key in WEIGHT_AXES), None)
    if matrix is None or "group_index" in keys:
        return (None,) * leaf.ndim
    if leaf.ndim == 4:  # keys and values of a prefix [L, P, K, H]
        return ("layers", "time", "kv_heads", None)
    row, column = WEIGHT_AXES[matrix]
    parts = {
        "bias": (column,),
        "scales": ("groups", column),
        "zeros": ("groups", column),
        "a": (row, "rank"),
        "b": ("rank", column),
    }
    own = next((parts[key] for key in keys if key in parts), (row, column))
    return ("layers",) * (leaf.ndim - len(own)) + own


def shardings(tree, mesh: jax.sharding.Mesh):
    """A NamedSharding for every array of a model, an adapter or an optimiser state over them."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, spec(_axes_of(path, leaf), leaf.shape, mesh)), tree
    )


def shard(tree, mesh: jax.sharding.Mesh | None):
    """Places a model or an adapter on a mesh; without a mesh it is returned as it is.

    In a job of several processes each passes the whole tree and keeps its own part.
    """
    if mesh is None:
        return tree
    return jax.tree.map(_place, tree, shardings(tree, mesh))


def batch_parts(mesh: jax.sharding.Mesh | None) -> int:
    """How many parts `shard_batch` cuts a batch into."""
    return 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]


def shard_batch(batch, mesh: jax.sharding.Mesh | None):
    """Places host arrays [B, ...] with the batch cut over `data` and `fsdp`.

    In a job of several processes each passes the whole batch and keeps its own rows.

    Raises:
        ValueError: the rows do not divide over the mesh.
    """
    if mesh is None:
        return jax.tree.map(jax.numpy.asarray, batch)
    parts = batch_parts(mesh)
    sharding = NamedSharding(mesh, PartitionSpec(RULES["batch"]))

    def place(x):
        if x.shape[0] % parts:
            raise ValueError(
                f"a batch of {x.shape[0]} rows does not divide over data x fsdp = {parts} devices; "
                f"choose a multiple of {parts}"
            )
        return _place(x, sharding)

    return jax.tree.map(place, batch)


def _place(x, sharding: NamedSharding) -> jax.Array:
    if sharding.is_fully_addressable:
        return jax.device_put(x, sharding)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: np.asarray(x)[index])
