"""Rows of an embedding table that is cut over a mesh, looked up where they lie."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from idp_jax.sharding import STORAGE_AXIS, TENSOR_AXIS, spec


def rows_of(table: jax.Array, ids: jax.Array) -> jax.Array:
    """Rows [B, T, E] of a table [V, E], for int32 [B, T].

    The partitioner would gather a table whose columns are cut over the devices that the batch is
    cut over, too: it is larger than what is looked up. Instead these devices exchange their ids,
    each looks up its columns for all, and they exchange those.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return table[ids]
    lies = spec(("vocab", "embed"), table.shape, mesh)
    batch = spec(("batch",), ids.shape[:1], mesh)[0]
    if lies[1] != STORAGE_AXIS or batch is None or mesh.shape[STORAGE_AXIS] == 1:
        return table[ids]

    def local(table: jax.Array, ids: jax.Array) -> jax.Array:
        ids = jax.lax.all_gather(ids, STORAGE_AXIS, axis=0, tiled=True)
        if lies[0] is None:
            columns = table[ids]
        else:  # every row lies on one device; the others add nothing
            place = ids - jax.lax.axis_index(TENSOR_AXIS) * table.shape[0]
            here = (place >= 0) & (place < table.shape[0])
            columns = table[jnp.where(here, place, 0)]
            columns = jnp.where(here[..., None], columns, jnp.zeros((), table.dtype))
            columns = jax.lax.psum(columns, TENSOR_AXIS)
        return jax.lax.all_to_all(columns, STORAGE_AXIS, 0, columns.ndim - 1, tiled=True)

    whole = PartitionSpec(batch, None, None)
    return jax.shard_map(
        local, mesh=mesh, in_specs=(lies, PartitionSpec(batch, None)), out_specs=whole
    )(table, ids)
