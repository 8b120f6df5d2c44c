"""The Hessian H = 2/n X^T X of a layer's output error, and the factor that the walks follow.

Invariant: float32 with precision=HIGHEST throughout; a column that never saw an input (dead) is
decoupled from all others.

The factor is U, upper triangular with H^-1 = U^T U. The papers invert H and factorise the inverse.
Here, with J the reversal of rows, Cholesky of J H J = L L^T gives H = R R^T with R = J L J upper
triangular, so H^-1 = R^-T R^-1 and U = R^-1: one factorisation and one triangular solve, and the
ill-conditioned inverse never appears. U is unique, so both ways agree.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

_HIGHEST = jax.lax.Precision.HIGHEST
_MAX_RETRIES = 4
_DAMPING_STEP = 10.0
# Where the ladder goes on from a damping of 0, which no factor could raise.
_SMALLEST_RETRY = 1e-3
# Rows of a Hessian that are put into another order at a time.
_ROWS = 128


class HessianState(NamedTuple):
    """Running mean over tokens: hessian float32 [I, I] = 2/n X^T X, count float32 scalar n."""

    hessian: jax.Array
    count: jax.Array


class Diagnostics(NamedTuple):
    """What happened in the factorisation of one Hessian (scalars).

    `damping_used` is a fraction of the mean diagonal, NaN if no damping of the ladder made the
    Hessian positive definite: the weights that come with it are NaN too. `retries` counts the
    tenfold increases. `dead_columns` counts inputs that were always 0. `relative_error` is
    `relative_output_error` of the compressed weights.
    """

    damping_used: jax.Array
    retries: jax.Array
    dead_columns: jax.Array
    relative_error: jax.Array


class InverseFactor(NamedTuple):
    """Upper Cholesky factor of H^-1 and how it was come by.

    Attributes:
      factor: float32 [I, I].
      dead: bool [I], columns that never saw an input.
      damping_used: float32 scalar, the fraction of the mean diagonal that was needed; NaN where
        none was enough.
      retries: int32 scalar.
    """

    factor: jax.Array
    dead: jax.Array
    damping_used: jax.Array
    retries: jax.Array


def empty_state(inputs: int) -> HessianState:
    """The state before the first token."""
    return HessianState(jnp.zeros((inputs, inputs), jnp.float32), jnp.zeros((), jnp.float32))


@jax.jit
def accumulate(state: HessianState, x: jax.Array) -> HessianState:
    """Adds a batch of layer inputs.

    Args:
      state: what was accumulated so far.
      x: real (unpadded) tokens of any floating dtype [tokens, I].

    Returns:
      The mean over all tokens so far.
    """
    x = x.astype(jnp.float32)
    count = state.count + float(x.shape[0])
    batch = _gram(x)
    divisor = jnp.maximum(count, 1.0)
    # Scaled before the sum: the running mean stays in range however many tokens follow.
    hessian = state.hessian * (state.count / divisor) + batch * (2.0 / divisor)
    return HessianState(hessian, count)


def _gram(x: jax.Array) -> jax.Array:
    """x^T x, a quarter of it by mirroring: [n, I] -> [I, I]."""
    half = x.shape[1] // 2
    left, right = x[:, :half], x[:, half:]
    upper = jnp.matmul(left.T, x, precision=_HIGHEST)
    corner = jnp.matmul(right.T, right, precision=_HIGHEST)
    return jnp.block([[upper], [upper[:, half:].T, corner]])


@jax.jit
def inverse_factor(
    hessian: jax.Array, damping: float | jax.Array, order: jax.Array | None = None
) -> InverseFactor:
    """Upper triangular U with H^-1 = U^T U, after damping.

    Args:
      hessian: float32 [I, I], symmetric positive semidefinite.
      damping: what to add to the diagonal, as a fraction of the mean diagonal over live columns.
        Multiplied by 10, at most four times, while the Cholesky factorisation fails.
      order: int32 [I]; given, U is the factor of H[order][:, order], in whose order `dead` is too.

    Returns:
      The factor and how it was reached; the factor is NaN if every damping failed. Dead columns
      have H_ii = 1 and no coupling, the mean leaves them out so that the damping does not depend on
      the scale of the inputs.
    """
    if order is None:
        order = jnp.arange(hessian.shape[0], dtype=jnp.int32)
    diagonal = jnp.diagonal(hessian)[order]
    dead = diagonal == 0.0
    live_count = jnp.maximum(jnp.sum(~dead, dtype=jnp.float32), 1.0)
    mean = jnp.sum(diagonal) / live_count
    backwards, ones = order[::-1], jnp.where(dead, 1.0, 0.0)[::-1]

    def failed(state: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        lower, _, retries = state
        return (retries < 0) | (~jnp.all(jnp.isfinite(lower)) & (retries < _MAX_RETRIES))

    def attempt(
        state: tuple[jax.Array, jax.Array, jax.Array],
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        _, fraction, retries = state
        raised = jnp.where(fraction == 0.0, _SMALLEST_RETRY, fraction * _DAMPING_STEP)
        fraction = jnp.where(retries < 0, fraction, raised)

        def row_of(index: jax.Array, extra: jax.Array) -> jax.Array:
            return hessian[index][backwards] + jnp.where(backwards == index, extra, 0.0)

        damped = jax.lax.map(
            lambda row: row_of(*row), (backwards, ones + fraction * mean), batch_size=_ROWS
        )
        lower = jax.lax.linalg.cholesky(damped, symmetrize_input=False)
        return lower.T, fraction, retries + jnp.int32(1)

    # These are the job's largest arrays, and what a loop reads lives beside all that it computes:
    # so the first attempt is a turn of the loop, the order is applied inside it row by row, and
    # the inverse stands behind it.
    start = (jnp.zeros_like(hessian), jnp.asarray(damping, jnp.float32), jnp.int32(-1))
    upper, fraction, retries = jax.lax.while_loop(failed, attempt, start)
    finite = jnp.all(jnp.isfinite(upper))
    # Made from the loop's result, so that it is made after the loop.
    identity = jnp.diag(jnp.full(len(order), jnp.where(finite, jnp.float32(1), jnp.nan)))
    inverse = jax.lax.linalg.triangular_solve(
        upper, identity, left_side=True, lower=False, transpose_a=True
    )
    used = jnp.where(finite, fraction, jnp.nan)
    return InverseFactor(inverse[::-1, ::-1], dead, used, retries)


@jax.jit
def relative_output_error(
    weights: jax.Array, compressed: jax.Array, hessian: jax.Array
) -> jax.Array:
    """Squared output error of compressed weights over the squared output, on calibration tokens.

    Args:
      weights: float32 [O, I], before.
      compressed: float32 [O, I], after.
      hessian: float32 [I, I].

    Returns:
      tr(E H E^T) / tr(W H W^T) with E = W - W_hat: a float32 scalar, 0 if both are 0.
    """
    error = _energy(weights - compressed, hessian)
    output = _energy(weights, hessian)
    return jnp.where(error == 0.0, 0.0, error / output)


def _energy(matrix: jax.Array, hessian: jax.Array) -> jax.Array:
    """tr(M H M^T)."""
    return jnp.sum(jnp.matmul(matrix, hessian, precision=_HIGHEST) * matrix)
