"""The attention of TPUs, interpreted, against the blocks that every device can run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idp_jax.models.attention import block_attention, splash_attention
from idp_jax.models.layers import visibility
from idp_jax.sharding import make_mesh

_HEADS, _WIDTH = 4, 64


def _inputs(batch: int, time: int, kv_heads: int, rows: int = 0, held: int = 0, seed: int = 0):
    """Queries, keys, values, and a past whose first slots are empty."""
    generator = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(generator.normal(size=shape), jnp.float32)
    stored = lambda b, t: draw(b, t, kv_heads, _WIDTH)
    own = draw(batch, time, _HEADS, _WIDTH), stored(batch, time), stored(batch, time)
    if not rows:
        return own, None
    mask = jnp.arange(held)[None] >= jnp.arange(rows)[:, None]
    return own, (stored(rows, held), stored(rows, held), mask)


def _both(own, past, documents=None):
    """Values and gradients of either, for everything that is a number."""
    length = own[0].shape[1]
    ones = jnp.ones((1 if documents is None else len(documents), length), jnp.int32)
    visible = visibility(ones, documents)
    upstream = jnp.asarray(np.random.default_rng(9).normal(size=(length, _HEADS * _WIDTH)))

    def of(function):
        def loss(own, stored):
            out = function(*own, None if past is None else (*stored, past[2]))
            return (out * upstream.astype(out.dtype)).sum(), out

        stored = None if past is None else past[:2]
        return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(own, stored)

    with jax.numpy_dtype_promotion("standard"):  # JAX's kernel promotes
        splash = of(lambda *a: splash_attention(*a[:3], documents, a[3], interpret=True))
    return splash, of(lambda *a: block_attention(*a[:3], visible, a[3]))


def _assert_equal(found, wanted):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.abs(b).max() + 1))


@pytest.mark.parametrize("rows, held", [(0, 0), (2, 130)])
def test_splash_equals_blocks(rows, held):
    _assert_equal(*_both(*_inputs(4, 200, 2, rows, held)))


@pytest.mark.slow
@pytest.mark.parametrize("time, kv_heads", [(128, 4), (300, 1)])
@pytest.mark.parametrize("rows, held", [(1, 5), (2, 1), (4, 5)])
def test_splash_equals_blocks_of_other_shapes(time, kv_heads, rows, held):
    _assert_equal(*_both(*_inputs(4, time, kv_heads, rows, held)))


def test_documents_see_themselves_alone():
    own, past = _inputs(2, 200, 2)
    documents = jnp.asarray(np.repeat([[0, 1, 2], [3, 3, 4]], [70, 60, 70], axis=1), jnp.int32)
    _assert_equal(*_both(own, past, documents))


@pytest.mark.slow
@pytest.mark.parametrize("shape", [{"data": 2, "model": 4}, {"fsdp": 2, "model": 2, "data": 2}])
def test_on_a_mesh_each_device_does_its_own(shape):
    # Two kv heads do not divide over four devices: they are repeated.
    own, past = _inputs(4, 128, 2, 1, 5)
    alone, wanted = _both(own, past)
    _assert_equal(alone, wanted)
    with jax.set_mesh(make_mesh(shape)):
        _assert_equal(_both(own, past)[0], wanted)
