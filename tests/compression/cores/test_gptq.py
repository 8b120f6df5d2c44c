"""GPTQ against a plain float64 loop over columns, and what must hold of any result."""

import jax.numpy as jnp
import numpy as np
import pytest

from idp_jax.compression.cores.gptq import gptq
from idp_jax.compression.cores.grid import dequantize_matrix, find_grid
from idp_jax.compression.cores.hessian import relative_output_error
from idp_jax.compression.cores.magnitude import magnitude
from idp_jax.compression.cores.rtn import rtn


def _grid(columns: np.ndarray, bits: int, symmetric: bool) -> tuple[np.ndarray, np.ndarray]:
    grid = find_grid(jnp.asarray(columns, jnp.float32), bits, symmetric)
    return tuple(np.asarray(a, np.float64) for a in grid)


def _column_loop(W, U, bits, group_size, symmetric):
    """The algorithm without blocks: after each column all later ones are updated at once."""
    W = W.astype(np.float64).copy()
    codes = np.zeros(W.shape)
    scale, zero = _grid(W, bits, symmetric)
    for i in range(W.shape[1]):
        if group_size != -1 and i % group_size == 0:
            scale, zero = _grid(W[:, i : i + group_size], bits, symmetric)
        codes[:, i] = np.clip(np.round(W[:, i] / scale) + zero, 0, 2**bits - 1)
        error = (W[:, i] - scale * (codes[:, i] - zero)) / U[i, i]
        W[:, i:] -= np.outer(error, U[i, i:])
    return codes


@pytest.mark.parametrize(
    ("inputs", "group_size", "block_size", "bits", "symmetric"),
    [
        (96, -1, 32, 3, False),
        (128, -1, 128, 4, True),
        (160, -1, 64, 3, False),  # the last block is partial
        (96, -1, 500, 2, False),
        (128, 32, 32, 3, False),
        (160, 32, 128, 4, False),  # groups within blocks, the last block partial
        (128, 64, 32, 3, True),  # groups wider than the block
        (96, 24, 32, 8, False),  # groups that do not divide the block
        (96, 96, 128, 3, True),
    ],
)
def test_equals_the_column_loop(
    make_layer, exact_hessian, exact_factor, inputs, group_size, block_size, bits, symmetric
):
    weights, x = make_layer(24, inputs)
    H = exact_hessian(x)
    matrix, restored, diagnostics = gptq(
        jnp.asarray(weights),
        jnp.asarray(H),
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        block_size=block_size,
    )
    expected = _column_loop(weights, exact_factor(H, 0.01), bits, group_size, symmetric)
    differing = np.sum(np.any(np.asarray(matrix.codes) != expected, axis=1))
    # A weight halfway between two levels may fall to either side in float32, and its row follows.
    assert differing <= 1
    np.testing.assert_allclose(restored, dequantize_matrix(matrix), rtol=1e-6, atol=1e-6)
    groups = 1 if group_size == -1 else inputs // group_size
    assert matrix.scales.shape == matrix.zeros.shape == (24, groups)
    assert matrix.codes.dtype == matrix.zeros.dtype == jnp.uint8
    assert int(diagnostics.retries) == int(diagnostics.dead_columns) == 0


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [-1, 32])
def test_better_than_rounding(make_layer, exact_hessian, bits, group_size):
    weights, x = make_layer(24, 128, seed=bits)
    weights, H = jnp.asarray(weights), jnp.asarray(exact_hessian(x))
    matrix, restored, diagnostics = gptq(weights, H, bits=bits, group_size=group_size)
    rounded = dequantize_matrix(rtn(weights, bits=bits, group_size=group_size))
    assert int(matrix.codes.max()) < 2**bits
    error = float(relative_output_error(weights, restored, H))
    assert error < float(relative_output_error(weights, rounded, H))
    np.testing.assert_allclose(diagnostics.relative_error, error, rtol=1e-4)


def test_uncorrelated_inputs_give_plain_rounding(make_layer):
    weights = jnp.asarray(make_layer(24, 96)[0])
    matrix, _, _ = gptq(weights, jnp.eye(96, dtype=jnp.float32), bits=3, group_size=32)
    for ours, expected in zip(matrix, rtn(weights, bits=3, group_size=32), strict=True):
        np.testing.assert_array_equal(ours, expected)


def test_dead_columns_become_zero(make_layer, exact_hessian):
    weights, x = make_layer(24, 96)
    x[:, [3, 50]] = 0
    weights[:, 3] = 100  # must not widen the grid of the row
    H = jnp.asarray(exact_hessian(x))
    matrix, restored, diagnostics = gptq(jnp.asarray(weights), H, bits=4)
    assert int(diagnostics.dead_columns) == 2
    np.testing.assert_array_equal(restored[:, [3, 50]], 0)
    assert float(matrix.scales.max()) < 1


def test_singular_hessian_is_damped(make_layer):
    weights, x = make_layer(8, 64)
    few = x[:5].astype(np.float64)
    H = jnp.asarray(few.T @ few, jnp.float32)
    _, restored, diagnostics = gptq(jnp.asarray(weights), H, bits=4, damping=0.0)
    assert float(diagnostics.damping_used) > 0
    assert np.all(np.isfinite(restored))


def test_bad_input():
    weights, H = jnp.ones((4, 96), jnp.float32), jnp.eye(96, dtype=jnp.float32)
    with pytest.raises(ValueError, match=r"group_size 64 does not divide 96 inputs.*divisor"):
        gptq(weights, H, bits=4, group_size=64)
    with pytest.raises(ValueError, match=r"bits must be one of .* not 5"):
        gptq(weights, H, bits=5)
    with pytest.raises(ValueError, match="block_size must be at least 1, not 0"):
        gptq(weights, H, bits=4, block_size=0)


def _visits(importance: np.ndarray, act_order: str, group: int, run: int = 1) -> np.ndarray:
    """The order of visits, by hand."""
    runs = [np.arange(first, first + run) for first in range(0, len(importance), run)]
    best = lambda columns: -importance[columns].max()
    if act_order == "static":
        return np.concatenate(sorted(runs, key=best))
    if act_order == "group":
        groups = [np.arange(first, first + group) for first in range(0, len(importance), group)]
        inside = lambda own: sorted((r for r in runs if r[0] in own), key=best)
        return np.concatenate([r for own in sorted(groups, key=best) for r in inside(own)])
    return np.arange(len(importance))


def _ordered_loop(W, H, exact_factor, bits, group, act_order):
    """Codes in file order.

    Static grids are made from the original weights, others from those at the group's first visit.
    """
    order = _visits(np.diag(H), act_order, group)
    U = exact_factor(H[np.ix_(order, order)], 0.01)
    W, original = W.astype(np.float64)[:, order], W
    codes, grids = np.zeros(W.shape), {}
    for i, column in enumerate(order):
        g = column // group
        if g not in grids and act_order == "static":
            grids[g] = _grid(original[:, g * group : (g + 1) * group], bits, False)
        elif g not in grids:
            grids[g] = _grid(W[:, i : i + group], bits, False)
        scale, zero = grids[g]
        codes[:, column] = np.clip(np.round(W[:, i] / scale) + zero, 0, 2**bits - 1)
        error = (W[:, i] - scale * (codes[:, column] - zero)) / U[i, i]
        W[:, i:] -= np.outer(error, U[i, i:])
    return codes, np.stack([grids[g][0] for g in sorted(grids)], 1)


def _uneven(make_layer, outputs=24, inputs=128, seed=0):
    """A layer whose inputs differ in size."""
    weights, x = make_layer(outputs, inputs, seed)
    return weights, x * np.random.default_rng(9).uniform(0.2, 3, inputs).astype(np.float32)


@pytest.mark.parametrize("act_order", ["static", "group"])
@pytest.mark.parametrize(("inputs", "group_size", "block_size"), [(128, 32, 32), (96, 32, 64)])
def test_orders_equal_the_column_loop(
    make_layer, exact_hessian, exact_factor, act_order, inputs, group_size, block_size
):
    weights, x = _uneven(make_layer, inputs=inputs)
    H = exact_hessian(x)
    matrix, restored, _ = gptq(
        jnp.asarray(weights),
        jnp.asarray(H),
        bits=3,
        group_size=group_size,
        act_order=act_order,
        block_size=block_size,
    )
    codes, scales = _ordered_loop(weights, H, exact_factor, 3, group_size, act_order)
    # A weight halfway between two levels may fall to either side in float32, and its row follows.
    assert np.sum(np.any(np.asarray(matrix.codes) != codes, axis=1)) <= 1
    assert np.sum(np.any(~np.isclose(matrix.scales, scales, rtol=2e-3), axis=1)) <= 1
    np.testing.assert_allclose(restored, dequantize_matrix(matrix), rtol=1e-6, atol=1e-6)


def test_order_and_search_lower_the_error(make_layer, exact_hessian):
    """Not of every matrix, but clearly of many rows."""
    weights, x = _uneven(make_layer, outputs=96)
    weights, H = jnp.asarray(weights), jnp.asarray(exact_hessian(x))
    error = lambda **settings: float(
        gptq(weights, H, bits=3, group_size=32, **settings)[2].relative_error
    )
    plain = error()
    assert error(act_order="group") < plain and error(act_order="static") < 1.1 * plain
    assert error(grid="mse") < plain
    assert error(grid="mse", act_order="group") < plain


@pytest.mark.parametrize("act_order", ["none", "static", "group"])
@pytest.mark.parametrize(
    ("target", "group_size"),
    [({"sparsity": 0.5}, 32), ({"sparsity": 0.4}, -1), ({"pattern": (2, 4)}, 32)],
)
def test_zeros_and_fewer_bits_in_one_pass(make_layer, exact_hessian, act_order, target, group_size):
    weights, x = _uneven(make_layer)
    H = jnp.asarray(exact_hessian(x))
    matrix, restored, diagnostics = gptq(
        jnp.asarray(weights),
        H,
        bits=3,
        group_size=group_size,
        act_order=act_order,
        grid="mse",
        block_size=64,
        **target,
    )
    np.testing.assert_allclose(restored, dequantize_matrix(matrix), rtol=1e-6, atol=1e-6)
    # A zero is the code of the zero point: weights that round to it come on top.
    zero = np.repeat(np.asarray(matrix.zeros), 128 // matrix.zeros.shape[1], axis=1)
    zeros = np.asarray(matrix.codes) == zero
    np.testing.assert_array_equal(np.asarray(restored) == 0, zeros)
    if "pattern" in target:
        assert (zeros.reshape(24, -1, 4).sum(2) >= 2).all()
    elif group_size == -1 or act_order == "static":
        assert zeros.sum() >= int(next(iter(target.values())) * weights.size)
    else:
        assert (zeros.reshape(24, 4, 32).sum((0, 2)) >= 24 * 16).all()
    _, mask = magnitude(jnp.asarray(weights), **target)
    apart = rtn(jnp.asarray(weights), bits=3, group_size=group_size, grid="mse", mask=mask)
    assert float(diagnostics.relative_error) < float(
        relative_output_error(jnp.asarray(weights), dequantize_matrix(apart), H)
    )


@pytest.mark.parametrize("target", [{"sparsity": 0.5}, {"pattern": (2, 4)}])
def test_counts_of_zeros_are_exact(make_layer, exact_hessian, target):
    """With 8 bits almost no weight rounds to zero by itself."""
    weights, x = _uneven(make_layer)
    weights += np.sign(weights)  # none of them is small
    settings = {"bits": 8, "group_size": 32, "act_order": "group", **target}
    _, restored, _ = gptq(jnp.asarray(weights), jnp.asarray(exact_hessian(x)), **settings)
    zeros = np.asarray(restored) == 0
    if "pattern" in target:
        np.testing.assert_array_equal(zeros.reshape(24, -1, 4).sum(2), 2)
    else:
        np.testing.assert_array_equal(zeros.reshape(24, 4, 32).sum((0, 2)), 24 * 16)


def test_bad_orders_and_targets():
    weights, H = jnp.ones((4, 96), jnp.float32), jnp.eye(96, dtype=jnp.float32)
    with pytest.raises(ValueError, match="act_order must be one of none, static, group, not 'on'"):
        gptq(weights, H, bits=4, act_order="on")
    with pytest.raises(ValueError, match="give either sparsity or pattern"):
        gptq(weights, H, bits=4, sparsity=0.5, pattern=(2, 4))
    with pytest.raises(ValueError, match="24 inputs do not divide into runs of 7"):
        gptq(weights, H, bits=4, group_size=24, pattern=(3, 7))
