"""An objective counts what the batch says it should."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idp_jax.recover import Repaired
from idp_jax.training import Batch, next_token
from tests.helpers import tiny_decoder, tiny_ids


def test_next_token_is_the_mean_cross_entropy_of_the_counted_tokens():
    model = tiny_decoder("llama", num_layers=1)
    tokens = tiny_ids(model, batch=3, time=7)
    objective = jax.jit(next_token)
    likelihood = np.asarray(jax.nn.log_softmax(model(tokens)[:, :-1]), np.float64)
    losses = -np.take_along_axis(likelihood, np.asarray(tokens)[:, 1:, None], -1)[..., 0]
    found, parts = objective(Repaired(model), Batch(tokens))
    assert float(found) == pytest.approx(losses.mean(), rel=1e-5)
    assert float(parts["ce"]) == float(found)
    mask = np.random.default_rng(0).random(tokens.shape) < 0.5
    masked = objective(Repaired(model), Batch(tokens, loss_mask=jnp.asarray(mask)))[0]
    assert float(masked) == pytest.approx(losses[mask[:, 1:]].mean(), rel=1e-5)
    nothing = objective(Repaired(model), Batch(tokens, loss_mask=jnp.zeros(tokens.shape, bool)))[0]
    assert float(nothing) == 0.0


def test_the_loss_of_a_packed_row_is_that_of_its_documents_alone():
    model = tiny_decoder("llama", num_layers=1)
    tokens = tiny_ids(model, batch=1, time=12)
    segments = jnp.asarray([[0] * 7 + [1] * 5], jnp.int32)
    packed = jax.jit(next_token)(Repaired(model), Batch(tokens, segments))[0]
    first, second = (
        next_token(Repaired(model), Batch(part))[0] for part in (tokens[:, :7], tokens[:, 7:])
    )
    assert float(packed) == pytest.approx((6 * float(first) + 4 * float(second)) / 10, rel=1e-5)
    mask = jnp.asarray([[1] * 7 + [0] * 5], bool)
    masked = next_token(Repaired(model), Batch(tokens, segments, loss_mask=mask))[0]
    assert float(masked) == pytest.approx(float(first), rel=1e-5)
