"""Exact counts, ties included, against a stable sort."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from idp_jax.compression.cores.masks import check_target, smallest, smallest_of_run

_SCORES = st.lists(
    st.sampled_from([0.0, 1e-30, 0.5, 0.75, 1.0, 3e38, float("inf")]), min_size=12, max_size=12
)


@settings(deadline=None, max_examples=60)
@given(_SCORES, st.integers(0, 12))
def test_smallest_is_a_stable_sort(scores, count):
    scores = np.array(scores, np.float32)
    expected = np.zeros(12, bool)
    expected[np.argsort(scores, kind="stable")[:count]] = True
    mask = smallest(jnp.asarray(scores).reshape(3, 4), count)
    np.testing.assert_array_equal(mask, expected.reshape(3, 4))


@settings(deadline=None, max_examples=60)
@given(_SCORES, st.integers(0, 4))
def test_smallest_of_run_is_a_stable_sort(scores, count):
    runs = np.array(scores, np.float32).reshape(4, 3)
    ranks = np.argsort(np.argsort(runs, axis=0, kind="stable"), axis=0)
    np.testing.assert_array_equal(smallest_of_run(jnp.asarray(runs), count), ranks < count)


def test_smallest_of_one():
    one = jnp.zeros((1, 1), jnp.float32)
    assert not bool(smallest(one, 0)[0, 0])
    assert bool(smallest(one, 1)[0, 0])


@pytest.mark.parametrize(
    ("sparsity", "pattern", "message"),
    [
        (None, None, "either sparsity or pattern"),
        (0.5, (2, 4), "either sparsity or pattern"),
        (1.0, None, r"sparsity 1.0 is outside \[0, 1\)"),
        (-0.1, None, "sparsity -0.1 is outside"),
        (float("nan"), None, "sparsity nan is outside"),
        (None, (4, 4), r"pattern \(4, 4\) must be"),
        (None, (0, 4), r"pattern \(0, 4\) must be"),
        (None, (2, 5), "96 inputs do not divide into runs of 5"),
    ],
)
def test_bad_targets(sparsity, pattern, message):
    with pytest.raises(ValueError, match=message):
        check_target(96, sparsity, pattern)
