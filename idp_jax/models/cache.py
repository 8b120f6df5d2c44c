"""Keys and values that stand before the input: a prompt's, a pool's choice, or a decoding cache.

By causality a prompt's keys and values do not depend on the input that follows it, so a prefix is
computed once per model and stored. One class serves prefixes and caches; the models only ever
attend to a `KV` followed by the input itself.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct


class KV(struct.PyTreeNode):
    """Stored keys and values of every layer.

    Attributes:
        k, v: [L, B, S, K, H]; B is 1 where all rows share them. Keys are stored after RoPE. Beside
            k and v of several rows, mask and next_position may have one for all of them.
        mask: bool [B, S]: slots that hold something; or [L, B, S], where layers hold different
            ones.
        next_position: int32 [B]: the position of the token that follows.
    """

    k: jax.Array
    v: jax.Array
    mask: jax.Array
    next_position: jax.Array

    @property
    def batch(self) -> int:
        """The number of rows, 1 where shared."""
        return self.k.shape[1]

    @property
    def length(self) -> int:
        """The number of slots S."""
        return self.k.shape[2]

    def repeat(self, batch: int) -> "KV":
        """The same prefix for `batch` rows; a KV with rows of its own stays as it is."""
        if self.batch != 1 or batch == 1:
            return self
        rows = lambda x, axis: jnp.repeat(x, batch, axis)
        mask = rows(self.mask, self.mask.ndim - 2)
        return KV(rows(self.k, 1), rows(self.v, 1), mask, rows(self.next_position, 0))

    def rows(self, index: jax.Array) -> "KV":
        """Row index[b] of this KV for every b: [B'] -> KV with B' rows.

        A row that does not exist is not a number, so that nothing behind it passes for a result.
        """
        chosen = lambda x: x.at[:, index].get(mode="fill", fill_value=jnp.nan)
        like = lambda x: x.at[..., index, :].get(mode="clip")
        mask, next_position = like(self.mask), like(self.next_position[:, None])[:, 0]
        return KV(chosen(self.k), chosen(self.v), mask, next_position)

    def layer_masks(self) -> jax.Array:
        """The mask of every layer, bool [L, B, S]."""
        return jnp.broadcast_to(self.mask, (self.k.shape[0], *self.mask.shape[-2:]))

    def reserve(self, slots: int) -> "KV":
        """Room for `slots` more tokens, marked empty."""
        pad = lambda x, axis: jnp.pad(
            x, [(0, slots if number == axis else 0) for number in range(x.ndim)]
        )
        mask = pad(self.mask, self.mask.ndim - 1)
        return self.replace(k=pad(self.k, 2), v=pad(self.v, 2), mask=mask)

    def write(self, new: "KV", slot: jax.Array) -> "KV":
        """Puts `new`, of T tokens, into the slots from `slot` on (in place when donated)."""
        slot = jnp.asarray(slot, jnp.int32)
        zero = jnp.int32(0)
        put = lambda old, x: jax.lax.dynamic_update_slice(
            old, x.astype(old.dtype), (zero, zero, slot, zero, zero)
        )
        ours, theirs = _alike(self, new)
        start = (*[zero] * (ours.ndim - 1), slot)
        mask = jax.lax.dynamic_update_slice(ours, theirs, start)
        return KV(put(self.k, new.k), put(self.v, new.v), mask, new.next_position)

    def put(self, row: "KV", place: jax.Array) -> "KV":
        """`row`, of one row and as many slots, in the place of another (in place when donated)."""
        put = lambda old, new, axis: jax.lax.dynamic_update_slice_in_dim(
            old, new.astype(old.dtype), place, axis
        )
        return KV(
            put(self.k, row.k, 1),
            put(self.v, row.v, 1),
            put(self.mask, row.mask, self.mask.ndim - 2),
            put(self.next_position, row.next_position, 0),
        )

    def logical_axes(self) -> dict[str, Any]:
        """What the axes of the arrays mean, see `sharding.declared_axes`."""
        stored = ("layers", "batch", "time", "kv_heads", None)
        return {"k": stored, "v": stored, "mask": ("batch", "time"), "next_position": ("batch",)}


def concatenate(first: KV, second: KV) -> KV:
    """Two stretches of keys and values as one; `second`, the later, gives the next position."""
    batch = max(first.batch, second.batch)
    first, second = first.repeat(batch), second.repeat(batch)
    return KV(
        k=jnp.concatenate([first.k, second.k.astype(first.k.dtype)], 2),
        v=jnp.concatenate([first.v, second.v.astype(first.v.dtype)], 2),
        mask=jnp.concatenate(_alike(first, second), -1),
        next_position=second.next_position,
    )


def _alike(first: KV, second: KV) -> tuple[jax.Array, jax.Array]:
    """Both masks as [B, S], or as [L, B, S] where one of them differs by layers."""
    if first.mask.ndim == second.mask.ndim:
        return first.mask, second.mask
    return first.layer_masks(), second.layer_masks()
