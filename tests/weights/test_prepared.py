"""Weights in the kernels' layout: the same function as the packed weight they were made from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idp_jax.sharding import make_mesh
from idp_jax.weights import Prepared, for_kernels
from tests.helpers import quantize_decoder, tiny_decoder


def _weight(act_order=False):
    return quantize_decoder(tiny_decoder("llama"), 4, act_order=act_order).layers.q


def test_on_a_cpu_auto_changes_nothing():
    weight = _weight()
    assert for_kernels(weight) is weight


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("backend", ["pallas_tpu", "mosaic_gpu"])
def test_there_and_back(act_order, backend):
    weight = _weight(act_order)
    prepared = for_kernels(weight, backend=backend)
    assert isinstance(prepared, Prepared)
    restored = prepared.restored()
    for before, after in zip(jax.tree.leaves(weight), jax.tree.leaves(restored), strict=True):
        np.testing.assert_array_equal(before, after)
    np.testing.assert_array_equal(prepared.dense(), weight.dense())


def test_layers_in_a_scan():
    weight = _weight(act_order=True)
    prepared = for_kernels(weight, backend="pallas_tpu")
    prepared.backend = "auto"
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, weight.dense().shape[1])), jnp.float32)

    @jax.jit
    def walk(weight, x):
        return jax.lax.scan(lambda x, layer: (layer(x), None), x, weight)[0]

    np.testing.assert_allclose(walk(prepared, x), walk(weight, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("split", ["outputs", "inputs"])
def test_on_a_mesh(split):
    weight = _weight()
    prepared = for_kernels(weight, backend="pallas_tpu", split=split)
    prepared.backend = "auto"
    one = lambda weight: jax.tree.map(lambda leaf: leaf[0], weight)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 2, 64)), jnp.float32)
    with jax.set_mesh(make_mesh({"data": 2, "fsdp": 2, "model": 2})):
        y = jax.jit(lambda weight, x: weight(x))(one(prepared), x)
    np.testing.assert_allclose(y, one(weight)(x), rtol=1e-4, atol=1e-5)
