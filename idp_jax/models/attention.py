"""Attention of an input over itself and over what stands before it.

Softmax runs in float32 whatever the dtype of the activations. On TPUs a text without marks goes
through JAX's splash attention, which forms no scores outside its blocks; everything else, and every
other device, through blocks of queries written here.

Dims: B batch, T query time, S stored (past) time, N heads, K kv heads, G = N / K, H head dim,
R rows of the past, of which each serves B / R neighbouring rows of the input.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import PartitionSpec

from idp_jax.kernels.devices import platform
from idp_jax.sharding import spec

# What the backward pass keeps of a layer beside its input: the results of matrices, and of
# attention where it is one kernel, which take time to make. Scores, weights and norms it makes
# again, because to keep them takes longer.
KEPT = "matrix"
_MASKED = -1e30  # finite, so that a row that sees nothing gives a mean instead of NaN
_SMALLEST_BLOCK = 128  # queries of one block
_MOST_BLOCKS = 8
_LANES = 128  # splash attention takes multiples of these
_LARGEST_BLOCK = 512  # of its queries and keys

Past = tuple[jax.Array, jax.Array, jax.Array]
"""Keys and values [R, S, K, H] and their mask, bool [R | 1, S]."""


class Context(struct.PyTreeNode):
    """What every layer of one forward pass shares.

    Attributes:
        visible: bool [B | 1, T, T], see `layers.visibility`.
        rotation: cosines and sines [B | 1, T, H], or None where positions are learned.
        documents: int32 [B, T], the document of each token, or None where a row is one.
        plain: whether documents and the order alone decide what is visible (static).
    """

    visible: jax.Array
    rotation: tuple[jax.Array, jax.Array] | None
    documents: jax.Array | None = None
    plain: bool = struct.field(pytree_node=False, default=False)


def attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    context: Context,
    past: Past | None = None,
) -> jax.Array:
    """Attention of the input over itself and the past, which is visible where it holds something.

    Returns:
        [B, T, N * H] in the dtype of q.
    """
    # Its kernel compares one number of a query and a key: with documents none stands for a past
    # that all of them see.
    expressible = context.plain and (past is None or context.documents is None)
    if platform() == "tpu" and expressible and q_BTNH.shape[1] >= _LANES:
        return splash_attention(q_BTNH, k_BTKH, v_BTKH, context.documents, past)
    return block_attention(q_BTNH, k_BTKH, v_BTKH, context.visible, past)


def block_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    visible_BTT: jax.Array,
    past: Past | None = None,
) -> jax.Array:
    """As `attention`, in blocks of queries.

    Each goes against the keys up to its own end, because later ones are hidden anyway: half the
    work, and the scores of a block stay in cache. There are at most eight blocks, so that the
    program does not grow with the input.

    Args:
        visible_BTT: bool [B | 1, T, T]; it must be causal.
    """
    time = q_BTNH.shape[1]
    size = max(_SMALLEST_BLOCK, -(-time // _MOST_BLOCKS))
    blocks = []
    for start in range(0, time, size):
        end = min(start + size, time)
        seen = visible_BTT[:, start:end, :end]
        sources = [(k_BTKH[:, :end], v_BTKH[:, :end], seen[:, None, None])]
        if past is not None:
            keys, values, mask = past
            dtype = q_BTNH.dtype
            sources.append((keys.astype(dtype), values.astype(dtype), mask[:, None, None, None]))
        blocks.append(_attend(q_BTNH[:, start:end], sources))
    return blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, 1)


def _attend(q_BTNH: jax.Array, sources: list) -> jax.Array:
    """One softmax over several stretches of keys, (keys, values, mask) each.

    Normalised after the mixing: the sum of the weights divides the result [T, H], not the scores
    [T, S].
    """
    batch, time, heads, width = q_BTNH.shape
    kv_heads = sources[0][0].shape[2]
    shape = (batch, kv_heads, heads // kv_heads, time)
    scale = np.float32(width**-0.5).astype(q_BTNH.dtype)
    rows = jnp.moveaxis(q_BTNH * scale, 1, 2).reshape(batch, kv_heads, -1, width)
    logits = []
    for keys, _, mask in sources:
        scores = _against(rows, keys, "krh", "krs")
        mask = _rows_of(mask, batch) if len(mask) > 1 else mask
        logits.append(jnp.where(mask, scores.reshape(*shape, -1), _MASKED))
    # The largest score only keeps exp in range: the result does not depend on it.
    top = [jax.lax.stop_gradient(x).max(-1, keepdims=True, initial=_MASKED) for x in logits]
    top = top[0] if len(top) == 1 else jnp.maximum(*top)
    total, mixed = jnp.float32(0), jnp.float32(0)
    for scores, (_, values, _) in zip(logits, sources, strict=True):
        weights = jnp.exp(scores - top)
        total = total + weights.sum(-1, keepdims=True)
        weights = weights.reshape(*rows.shape[:3], -1).astype(values.dtype)
        mixed = mixed + _against(weights, values, "krs", "krh").reshape(*shape, width)
    out = (mixed / total).astype(q_BTNH.dtype)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, time, heads * width)


def _against(x: jax.Array, stored: jax.Array, axes: str, result: str) -> jax.Array:
    """Products of x [B, ...] with the keys or values [R, S, K, H] that belong to each row."""
    product = partial(jnp.einsum, preferred_element_type=jnp.float32)
    batch, rows = len(x), len(stored)
    if rows == batch:
        return product(f"b{axes},bskh->b{result}", x, stored)
    if rows == 1:
        return product(f"b{axes},skh->b{result}", x, stored[0])
    x = x.reshape(rows, -1, *x.shape[1:])
    found = product(f"ab{axes},askh->ab{result}", x, stored)
    return found.reshape(batch, *found.shape[2:])


def splash_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    documents_BT: jax.Array | None = None,
    past: Past | None = None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """As `attention`, of plain text, with JAX's kernel for TPUs.

    On a mesh each device does its own rows and heads.

    Args:
        documents_BT: int32 [B, T]; not with a past.
        interpret: run it without a TPU (static).
    """
    mesh = jax.sharding.get_abstract_mesh()
    local = partial(_splash, interpret=interpret)
    if mesh.empty or mesh.size == 1:
        return local(q_BTNH, k_BTKH, v_BTKH, documents_BT, past)
    names = {2: ("batch", None), 4: ("batch", None, "kv_heads", None)}
    place = lambda x: spec(names[x.ndim], x.shape, mesh)
    rows, _, heads, _ = place(q_BTNH)
    if place(k_BTKH)[2] != heads:
        # Kv heads do not divide: repeated, those of a query's head lie on its device.
        repeated = lambda x: jnp.repeat(x, q_BTNH.shape[2] // x.shape[2], 2)
        k_BTKH, v_BTKH = repeated(k_BTKH), repeated(v_BTKH)
        past = past and (repeated(past[0]), repeated(past[1]), past[2])
    arguments = (q_BTNH, k_BTKH, v_BTKH, documents_BT, past)
    inputs, output = jax.tree.map(place, arguments), PartitionSpec(rows, None, heads)
    mapped = jax.shard_map(local, mesh=mesh, in_specs=inputs, out_specs=output, check_vma=False)
    return mapped(*arguments)


def _splash(q_BTNH, k_BTKH, v_BTKH, documents_BT, past: Past | None, *, interpret: bool):
    """As `splash_attention`, on one device."""
    # Only TPUs need it, and it takes long to import.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    batch, time, heads, width = q_BTNH.shape
    rows = -(-time // _LANES) * _LANES
    # What stands before comes first, behind a few empty slots: so the visible is a triangle with
    # a rectangle on its left, and the keys' number has a divisor of some size.
    held = 0 if past is None else past[0].shape[1]
    before = held and -(-(held + rows) // (2 * _LANES)) * 2 * _LANES - rows
    scale = np.float32(width**-0.5).astype(q_BTNH.dtype)
    queries, keys, values = (_padded(x, rows) for x in (q_BTNH * scale, k_BTKH, v_BTKH))
    ids = None if documents_BT is None else _padded(documents_BT, rows)
    segments = None if ids is None else splash.SegmentIds(ids, ids)
    if past is not None:
        earlier = lambda x: _rows_of(_padded(x, before, before=True), batch)
        keys, values = (
            jnp.concatenate([earlier(old.astype(x.dtype)), x], 1)
            for old, x in zip(past[:2], (keys, values), strict=True)
        )
        empty = earlier(past[2].astype(jnp.int32))
        ones = jnp.ones((batch, rows), jnp.int32)
        segments = splash.SegmentIds(ones, jnp.concatenate([empty, ones], 1))
    q_size, kv_size = _block(rows), _block(before + rows)
    sizes = splash.BlockSizes(
        block_q=q_size,
        block_kv=kv_size,
        block_q_dkv=q_size,
        block_kv_dkv=kv_size,
        block_q_dq=q_size,
        block_kv_dq=kv_size,
    )
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([splash.CausalMask((rows, before + rows), before)] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=KEPT,
        interpret=interpret,
    )
    turned = (jnp.moveaxis(x, 1, 2) for x in (queries, keys, values))
    out: Any = jax.vmap(kernel)(*turned, segments)
    return jnp.moveaxis(out, 1, 2)[:, :time].reshape(batch, time, heads * width)


def _padded(x: jax.Array, time: int, *, before: bool = False) -> jax.Array:
    """x [B, T, ...] with zeros behind or before it, `time` long."""
    missing = time - x.shape[1]
    own = (missing, 0) if before else (0, missing)
    return jnp.pad(x, [(0, 0), own, *[(0, 0)] * (x.ndim - 2)])


def _rows_of(x: jax.Array, batch: int) -> jax.Array:
    """The rows [R, ...] of a past for each row of the input, [B, ...]."""
    return jnp.repeat(x, batch // len(x), 0)


def _block(length: int) -> int:
    """The largest block that divides a length."""
    return max(n for n in range(_LANES, _LARGEST_BLOCK + 1, _LANES) if length % n == 0)
