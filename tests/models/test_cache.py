"""A sequence cut into what is stored and what follows scores like the whole."""

import jax
import jax.numpy as jnp
import pytest

from idp_jax.models.cache import concatenate
from tests.helpers import close, keep, tiny_decoder, tiny_ids

VARIANTS = {
    "llama": lambda: tiny_decoder("llama"),
    "opt": lambda: tiny_decoder("opt", norm_before=False, final_norm=False, embedding_dim=32),
}


@pytest.fixture(scope="module", params=sorted(VARIANTS))
def model(request):
    return VARIANTS[request.param]()


def test_a_past_for_every_row(model):
    ids = tiny_ids(model, batch=3, time=12)
    hidden, past = keep(model, ids[:, :5])
    whole = model(ids)
    assert (past.batch, past.length) == (3, 5)
    assert past.next_position.tolist() == [5, 5, 5]
    assert close(model.logits(hidden), whole[:, :5])
    assert close(model(ids[:, 5:], past=past), whole[:, 5:])


def test_a_past_shared_by_all_rows(model):
    prefix, ids = tiny_ids(model, batch=1, time=5, seed=1), tiny_ids(model, batch=3, time=7)
    _, past = keep(model, prefix)
    whole = model(jnp.concatenate([jnp.repeat(prefix, 3, 0), ids], 1))[:, 5:]
    assert close(model(ids, past=past), whole)
    assert close(model(ids, past=past.repeat(3)), whole)


def test_a_shared_past_before_padded_rows(model):
    prefix, ids = tiny_ids(model, batch=1, time=5, seed=1), tiny_ids(model, batch=1, time=7)
    _, past = keep(model, prefix)
    expected = model(jnp.concatenate([prefix, ids], 1))[0, 5:]
    padded = jnp.concatenate([jnp.pad(ids, [(0, 0), (k, 3 - k)]) for k in (3, 0, 1)])
    logits = model(padded, (padded > 0).astype(jnp.int32), past=past)
    assert all(close(logits[row, k : k + 7], expected) for row, k in enumerate((3, 0, 1)))


def test_a_padded_past(model):
    """Rows of unequal length in the past: empty slots are neither seen nor counted."""
    ids = tiny_ids(model, batch=3, time=12)
    mask = jnp.ones((3, 5), jnp.int32).at[1, :2].set(0).at[2, 3:].set(0)
    _, past = keep(model, ids[:, :5], mask)
    assert past.next_position.tolist() == [5, 3, 3]
    logits = model(ids[:, 5:], past=past)
    assert close(logits[0], model(ids)[0, 5:])
    for row, kept in ((1, ids[1:2, 2:5]), (2, ids[2:, :3])):
        alone = model(jnp.concatenate([kept, ids[row : row + 1, 5:]], 1))
        assert close(logits[row], alone[0, 3:])


def test_a_long_input_after_a_long_past():
    """Both longer than one block of attention, and no multiple of it."""
    model = tiny_decoder("llama", max_positions=512)
    ids = tiny_ids(model, batch=2, time=310)
    _, past = keep(model, ids[:, :140])
    assert close(model(ids[:, 140:], past=past), model(ids)[:, 140:])


def test_rows_of_a_pool(model):
    pool, ids = tiny_ids(model, batch=3, time=5, seed=1), tiny_ids(model, batch=3, time=7)
    _, past = keep(model, pool)
    choice = jnp.asarray([2, 0, 2], jnp.int32)
    whole = model(jnp.concatenate([pool[choice], ids], 1))[:, 5:]
    assert close(model(ids, past=past.rows(choice)), whole)


def test_a_past_in_two_stretches(model):
    prefix, middle, ids = (
        tiny_ids(model, batch=b, time=t, seed=t) for b, t in ((1, 2), (3, 3), (3, 7))
    )
    _, first = keep(model, prefix)
    _, second = keep(model, middle, past=first)
    both = concatenate(first, second)
    assert (both.batch, both.length) == (3, 5)
    whole = model(jnp.concatenate([jnp.repeat(prefix, 3, 0), middle, ids], 1))[:, 5:]
    assert close(model(ids, past=both), whole)


def test_decoding_into_reserved_slots(model):
    """One token at a time into a cache of fixed size, rows padded on the left; compiled once."""
    ids = tiny_ids(model, batch=2, time=11)
    mask = jnp.ones((2, 5), jnp.int32).at[1, :2].set(0)
    _, prompt = keep(model, ids[:, :5], mask)
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
    ids = tiny_ids(model, batch=3, time=12)
    _, past = keep(model, ids[:, :5])
    assert close(model(ids[:, 5:], past=past.reserve(3)), model(ids[:, 5:], past=past))


def test_gradient_through_a_prefix_equals_gradient_through_the_whole():
    """A soft prompt stored as keys and values trains like one that stands in the sequence."""
    model = tiny_decoder("llama")
    ids = tiny_ids(model, batch=2, time=6)
    prompt = 0.4 * jax.random.normal(
        jax.random.key(0), (1, 3, model.config.embedding_dim), jnp.float32
    )

    def as_past(prompt):
        _, past = model.hidden(embeddings=prompt, keep=True)
        return jnp.square(model.hidden(ids, past=past)).mean()

    def in_sequence(prompt):
        prompts = jnp.repeat(prompt, 2, 0)
        whole = jnp.concatenate([prompts, model.embed(ids)], 1)
        return jnp.square(model.hidden(embeddings=whole)[:, 3:]).mean()

    value, gradient = jax.jit(jax.value_and_grad(as_past))(prompt)
    expected_value, expected = jax.jit(jax.value_and_grad(in_sequence))(prompt)
    assert close(value, expected_value)
    assert close(gradient, expected)
    assert float(jnp.abs(expected).max()) > 1e-3
