"""A sequence cut into what is stored and what follows scores like the whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idp_jax.models.cache import concatenate
from tests.helpers import quantize_decoder, tiny_decoder, tiny_ids

TOLERANCE = 2e-5
VARIANTS = {
    "llama": lambda: tiny_decoder("llama"),
    "llama-packed": lambda: quantize_decoder(tiny_decoder("llama"), 4),
    "opt": lambda: tiny_decoder("opt"),
    "opt-350m-like": lambda: tiny_decoder("opt", norm_before=False, final_norm=False, embedding_dim=32),
}


@pytest.fixture(scope="module", params=sorted(VARIANTS))
def model(request):
    return VARIANTS[request.param]()


def close(x, y, tolerance: float = TOLERANCE) -> bool:
    return bool(np.abs(np.asarray(x) - np.asarray(y)).max() <= tolerance)


def test_a_past_for_every_row(model):
    ids = tiny_ids(model, batch=3, time=12)
    hidden, past = model.hidden(ids[:, :5], keep=True)
    whole = model(ids)
    assert (past.batch, past.length) == (3, 5)
    assert past.next_position.tolist() == [5, 5, 5]
    assert close(model.logits(hidden), whole[:, :5])
    assert close(model(ids[:, 5:], past=past), whole[:, 5:])


def test_a_past_shared_by_all_rows(model):
    prefix, ids = tiny_ids(model, batch=1, time=5, seed=1), tiny_ids(model, batch=3, time=7)
    _, past = model.hidden(prefix, keep=True)
    whole = model(jnp.concatenate([jnp.repeat(prefix, 3, 0), ids], 1))[:, 5:]
    assert close(model(ids, past=past), whole)
    assert close(model(ids, past=past.repeat(3)), whole)


def test_a_shared_past_with_padding_on_either_side(model):
    prefix, ids = tiny_ids(model, batch=1, time=5, seed=1), tiny_ids(model, batch=1, time=6)
    _, past = model.hidden(prefix, keep=True)
    expected = model(jnp.concatenate([prefix, ids], 1))[:, 5:]
    padded = jnp.concatenate([jnp.pad(ids, [(0, 0), (3, 0)]), jnp.pad(ids, [(0, 0), (0, 3)])])
    mask = jnp.concatenate([jnp.pad(jnp.ones_like(ids), [(0, 0), (3, 0)]), jnp.pad(jnp.ones_like(ids), [(0, 0), (0, 3)])])
    logits = model(padded, mask, past=past)
    assert close(logits[0, 3:], expected[0])
    assert close(logits[1, :6], expected[0])


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_past(model, side):
    """Rows of unequal length in the past: empty slots are neither seen nor counted."""
    ids = tiny_ids(model, batch=2, time=10)
    mask = jnp.ones((2, 6), jnp.int32)
    mask = mask.at[1, :2].set(0) if side == "left" else mask.at[1, 4:].set(0)
    _, past = model.hidden(ids[:, :6], mask, keep=True)
    assert past.next_position.tolist() == [6, 4]
    logits = model(ids[:, 6:], past=past)
    kept = ids[1:, 2:6] if side == "left" else ids[1:, :4]
    alone = model(jnp.concatenate([kept, ids[1:, 6:]], 1))
    assert close(logits[0], model(ids[:1])[0, 6:])
    assert close(logits[1], alone[0, 4:])


def test_rows_of_a_pool(model):
    pool, ids = tiny_ids(model, batch=4, time=5, seed=1), tiny_ids(model, batch=3, time=6)
    _, past = model.hidden(pool, keep=True)
    choice = jnp.asarray([2, 0, 2], jnp.int32)
    whole = model(jnp.concatenate([pool[choice], ids], 1))[:, 5:]
    assert close(model(ids, past=past.rows(choice)), whole)


def test_a_past_in_two_stretches(model):
    prefix, middle, ids = (tiny_ids(model, batch=b, time=t, seed=t) for b, t in ((1, 3), (2, 4), (2, 5)))
    _, first = model.hidden(prefix, keep=True)
    _, second = model.hidden(middle, past=first, keep=True)
    both = concatenate(first, second)
    assert (both.batch, both.length) == (2, 7)
    whole = model(jnp.concatenate([jnp.repeat(prefix, 2, 0), middle, ids], 1))[:, 7:]
    assert close(model(ids, past=both), whole)


def test_decoding_into_reserved_slots(model):
    """One token at a time into a cache of fixed size, rows padded on the left; compiled once."""
    ids = tiny_ids(model, batch=2, time=11)
    mask = jnp.ones((2, 5), jnp.int32).at[1, :2].set(0)
    hidden, prompt = model.hidden(ids[:, :5], mask, keep=True)
    cache = prompt.reserve(6)
    traces = []

    @jax.jit
    def step(model, token, cache, slot):
        traces.append(None)
        hidden, new = model.hidden(token, past=cache, keep=True)
        return model.logits(hidden), cache.write(new, slot)

    scores = []
    for slot in range(5, 11):
        logits, cache = step(model, ids[:, slot : slot + 1], cache, slot)
        scores.append(logits[:, 0])
    scores = jnp.stack(scores, 1)
    assert len(traces) == 1
    assert cache.next_position.tolist() == [11, 9]
    assert close(scores[0], model(ids[:1])[0, 5:])
    assert close(scores[1], model(ids[1:, 2:])[0, 3:])


def test_reserved_slots_are_not_seen(model):
    ids = tiny_ids(model, batch=2, time=8)
    _, past = model.hidden(ids[:, :4], keep=True)
    assert close(model(ids[:, 4:], past=past.reserve(3)), model(ids[:, 4:], past=past))


def test_gradient_through_a_prefix_equals_gradient_through_the_whole(model):
    """A soft prompt computed once as keys and values trains like one that stands in the sequence."""
    ids = tiny_ids(model, batch=2, time=6)
    prompt = 0.4 * jax.random.normal(jax.random.key(0), (1, 3, model.config.embedding_dim), jnp.float32)

    def as_past(prompt):
        _, past = model.hidden(embeddings=prompt, keep=True)
        return jnp.square(model.hidden(ids, past=past)).mean()

    def in_sequence(prompt):
        prompts = jnp.repeat(prompt, 2, 0)
        whole = jnp.concatenate([prompts, model.embed(ids)], 1)
        return jnp.square(model.hidden(embeddings=whole)[:, 3:]).mean()

    value, gradient = jax.value_and_grad(as_past)(prompt)
    expected_value, expected = jax.value_and_grad(in_sequence)(prompt)
    assert close(value, expected_value)
    assert close(gradient, expected)
    assert float(jnp.abs(expected).max()) > 1e-3
