"""The orders of visits: what comes first, and what stays together."""

import jax.numpy as jnp
import numpy as np
import pytest

from idp_jax.compression.cores.order import ACT_ORDERS, column_order


def order_of(importance, *arguments) -> np.ndarray:
    return np.asarray(column_order(jnp.asarray(importance, jnp.float32), *arguments))


@pytest.mark.parametrize("act_order", ACT_ORDERS)
@pytest.mark.parametrize("run", [1, 4])
def test_every_column_is_visited_once(act_order, run):
    importance = np.random.default_rng(0).uniform(size=48)
    order = order_of(importance, act_order, 16, run)
    assert order.dtype == np.int32
    np.testing.assert_array_equal(np.sort(order), np.arange(48))
    # Runs stay together as they lie.
    runs = order.reshape(-1, run)
    np.testing.assert_array_equal(runs - runs[:, :1], np.broadcast_to(np.arange(run), runs.shape))
    assert (runs[:, 0] % run == 0).all()
    # The runs that are free to move come by their most important column.
    best = importance[runs].max(1)
    if act_order == "static":
        assert (np.diff(best) <= 0).all()
    if act_order == "group":
        groups = runs[:, 0].reshape(3, -1) // 16
        assert (groups == groups[:, :1]).all()
        best = best.reshape(3, -1)
        assert (np.diff(best, axis=1) <= 0).all() and (np.diff(best[:, 0]) <= 0).all()
    if act_order == "none":
        np.testing.assert_array_equal(order, np.arange(48))


def test_one_group_is_ordered_as_a_whole():
    importance = np.random.default_rng(1).uniform(size=24)
    expected = np.argsort(-importance, kind="stable")
    for act_order in ("static", "group"):
        np.testing.assert_array_equal(order_of(importance, act_order, 24), expected)


@pytest.mark.parametrize("act_order", ACT_ORDERS)
def test_equal_columns_stay_as_they_lie(act_order):
    np.testing.assert_array_equal(order_of(np.ones(32), act_order, 8), np.arange(32))


def test_another_order():
    with pytest.raises(ValueError, match="act_order must be one of none, static, group, not 'up'"):
        column_order(jnp.ones(8, jnp.float32), "up", 4)
