"""Round to nearest against its definition."""

import jax.numpy as jnp
import numpy as np
import pytest

from idp_jax.compression.cores.grid import dequantize_matrix, find_grid
from idp_jax.compression.cores.rtn import rtn


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [-1, 32, 96])
@pytest.mark.parametrize("symmetric", [False, True])
def test_every_weight_takes_its_nearest_level(make_layer, bits, group_size, symmetric):
    weights, _ = make_layer(10, 96)
    matrix = rtn(jnp.asarray(weights), bits=bits, group_size=group_size, symmetric=symmetric)
    group = 96 if group_size == -1 else group_size
    assert matrix.codes.dtype == matrix.zeros.dtype == jnp.uint8
    assert matrix.scales.shape == matrix.zeros.shape == (10, 96 // group)
    restored = np.asarray(dequantize_matrix(matrix))
    levels = np.arange(2**bits)
    for g in range(96 // group):
        own = weights[:, g * group : (g + 1) * group]
        scale, zero = (np.asarray(a) for a in find_grid(jnp.asarray(own), bits, symmetric))
        np.testing.assert_array_equal(matrix.scales[:, g], scale)
        grid = scale[:, None] * (levels - zero[:, None])
        nearest = np.abs(own[:, :, None] - grid[:, None, :]).min(axis=-1)
        error = np.abs(own - restored[:, g * group : (g + 1) * group])
        np.testing.assert_allclose(error, nearest, atol=1e-5)


def test_grid_points_stay(make_layer):
    weights, _ = make_layer(8, 64)
    once = dequantize_matrix(rtn(jnp.asarray(weights), bits=8, symmetric=True))
    assert float(jnp.max(jnp.abs(once - weights))) < 0.02


def test_bad_group_size():
    with pytest.raises(ValueError, match=r"group_size 36 does not divide 96 inputs.*divisor"):
        rtn(jnp.ones((4, 96), jnp.float32), bits=4, group_size=36)
    with pytest.raises(ValueError, match="group_size 0"):
        rtn(jnp.ones((4, 96), jnp.float32), bits=4, group_size=0)


@pytest.mark.parametrize("grid", ["minmax", "mse"])
def test_a_mask_gives_exact_zeros(make_layer, grid):
    weights, _ = make_layer(10, 96)
    mask = np.random.default_rng(2).uniform(size=weights.shape) < 0.4
    settings = {"bits": 3, "group_size": 32, "grid": grid}
    matrix = rtn(jnp.asarray(weights), **settings, mask=jnp.asarray(mask))
    assert (np.asarray(dequantize_matrix(matrix))[mask] == 0).all()
    # The grid is that of the weights that are left.
    alone = rtn(jnp.asarray(np.where(mask, 0, weights)), **settings)
    for own, expected in zip(matrix, alone, strict=True):
        np.testing.assert_array_equal(own, expected)


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_searched_grid_loses_less(make_layer, symmetric):
    weights, _ = make_layer(24, 96)
    settings = {"bits": 3, "group_size": 32, "symmetric": symmetric}
    costs = [
        np.square(
            np.asarray(dequantize_matrix(rtn(jnp.asarray(weights), **settings, grid=grid)))
            - weights
        )
        .reshape(24, 3, 32)
        .sum(2)
        for grid in ("mse", "minmax")
    ]
    assert (costs[0] <= costs[1] * (1 + 1e-5)).all() and costs[0].sum() < 0.95 * costs[1].sum()
