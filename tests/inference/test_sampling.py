"""What may be drawn against transformers' logits warpers, on the same logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idp_jax.inference.sampling import Pick


def theirs(logits: np.ndarray, temperature: float, top_k, top_p) -> np.ndarray:
    """Probabilities that transformers draws by."""
    torch = pytest.importorskip("torch")
    from transformers.generation import logits_process as warpers

    chain = [warpers.TemperatureLogitsWarper(temperature)]
    if top_k is not None:
        chain.append(warpers.TopKLogitsWarper(top_k))
    if top_p is not None:
        chain.append(warpers.TopPLogitsWarper(top_p))
    scores = torch.tensor(logits)
    for warper in chain:
        scores = warper(None, scores)
    return torch.softmax(scores, -1).numpy()


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [None, 1, 5])
@pytest.mark.parametrize("top_p", [None, 1e-6, 0.4, 0.9, 1.0])
def test_what_may_be_drawn_is_what_transformers_leaves(temperature, top_k, top_p):
    logits = np.random.default_rng(0).normal(0, 2, (8, 40)).astype(np.float32)
    expected = theirs(logits, temperature, top_k, top_p)
    pick = Pick.of(40, temperature, top_k, top_p)
    seen = []

    def draw(left):
        seen.append(left)
        return jnp.zeros(len(left), jnp.int32)

    chosen, finite = pick(jnp.asarray(logits), draw)
    found = np.asarray(jax.nn.softmax(seen[0], -1))
    if top_k is not None or top_p not in (None, 1.0):  # sorted; the first is the likeliest
        expected = -np.sort(-expected, -1)[:, : found.shape[1]]
        assert (np.asarray(chosen) == logits.argmax(-1)).all()
    assert np.abs(found - expected).max() < 1e-6
    assert (found > 0).sum() == (expected > 0).sum() and np.asarray(finite).all()


@pytest.mark.parametrize("top_p", [None, 0.5])
def test_logits_that_are_no_numbers_are_found_out(top_p):
    logits = jnp.asarray([[0.0, jnp.nan, 1.0], [1.0, 2.0, 0.0]])
    draw = lambda left: jax.random.categorical(jax.random.key(0), left)
    assert Pick.of(3, 1.0, 2, top_p)(logits, draw)[1].tolist() == [False, True]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((-1.0, None, None), "temperature"),
        ((float("inf"), None, None), "temperature"),
        ((1.0, 0, None), "top_k must be between 1 and the vocabulary of 9"),
        ((1.0, 10, None), "top_k"),
        ((1.0, None, 0.0), "top_p must be above 0 and at most 1"),
        ((1.0, None, 1.5), "top_p"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        Pick.of(9, *settings)
