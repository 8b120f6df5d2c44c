"""Products on a mesh of eight fake devices against the product on one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding

from idp_jax.kernels.quant_matmul.api import prepare, quant_matmul
from idp_jax.kernels.sharded import partition, sharded_matmul
from idp_jax.kernels.sparse24_matmul.api import from_codes, from_dense, sparse24_matmul
from tests.kernels.problems import checkpoint

_PALLAS = {"backend": "pallas_tpu", "interpret": True}


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((4, 2), ("data", "model"), (AxisType.Auto,) * 2)


def _arrays(bits, inputs, outputs, groups):
    kept = np.arange(inputs)[:, None] % 4 < 2
    return checkpoint(bits, inputs, outputs, groups, kept=kept)


def _weights():
    index = jnp.asarray(np.random.default_rng(1).permutation(np.arange(1024) // 128), jnp.int32)
    arrays = _arrays(3, 1024, 128, 8)
    dense = jnp.asarray(np.random.default_rng(2).normal(size=(1024, 128)), jnp.bfloat16)
    dense = jnp.where(jnp.arange(1024)[:, None] % 4 < 2, dense, 0)
    return {
        "grouped": (quant_matmul, prepare(*arrays, bits=3)),
        "act-order": (quant_matmul, prepare(*arrays, bits=3, group_index=index)),
        "one group": (quant_matmul, prepare(*_arrays(4, 1024, 128, 1), bits=4)),
        "fragments": (quant_matmul, prepare(*arrays, bits=3, backend="mosaic_gpu")),
        "sparse": (sparse24_matmul, from_dense(dense)),
        "sparse fragments": (sparse24_matmul, from_dense(dense, backend="mosaic_gpu")),
        "sparse codes": (sparse24_matmul, from_codes(*arrays, bits=3)),
        "sparse code fragments": (
            sparse24_matmul,
            from_codes(*arrays, bits=3, backend="mosaic_gpu"),
        ),
    }


@pytest.mark.parametrize("kind", list(_weights()))
@pytest.mark.parametrize("split", ["outputs", "inputs"])
def test_value_and_gradient(mesh, kind, split):
    multiply, weight = _weights()[kind]
    options = _PALLAS if kind in ("grouped", "one group") else {"backend": "xla"}
    rng = np.random.default_rng(3)
    x = jnp.asarray(rng.normal(size=(4, 2, 1024)), jnp.float32)
    upstream = jnp.asarray(rng.normal(size=(4, 2, 128)), jnp.float32)
    y, pull_back = jax.vjp(lambda x: multiply(x, weight, backend="xla"), x)
    placed = jax.tree.map(
        lambda array, spec: jax.device_put(array, NamedSharding(mesh, spec)),
        weight,
        partition(weight, "model", split),
    )

    @jax.jit
    def on_mesh(x, upstream, placed):
        product = functools.partial(
            sharded_matmul,
            functools.partial(multiply, **options),
            mesh=mesh,
            axis="model",
            split=split,
            batch="data",
        )
        ours, pull_back = jax.vjp(lambda x: product(x, placed), x)
        return ours, pull_back(upstream)[0]

    ours, gradient = on_mesh(x, upstream, placed)
    np.testing.assert_allclose(ours, y, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(gradient, pull_back(upstream)[0], rtol=1e-4, atol=1e-3)


def test_what_cannot_be_cut_is_named(mesh):
    weight = prepare(*_arrays(4, 768, 126, 6), bits=4)
    product = functools.partial(
        sharded_matmul, quant_matmul, jnp.ones((4, 768), jnp.float32), weight, mesh=mesh
    )
    with pytest.raises(ValueError, match="768 inputs do not divide into 2 parts of whole tiles"):
        product(axis="model", split="inputs")
    with pytest.raises(ValueError, match="126 outputs do not divide into 4 parts"):
        product(axis="data", split="outputs")
    with pytest.raises(ValueError, match="split must be inputs or outputs, not rows"):
        product(axis="data", split="rows")
