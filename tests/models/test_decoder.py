"""Changes that must have no effect: other rows, padding, later tokens, other branches, depth."""

import jax
import jax.numpy as jnp
import pytest

from idp_jax.models import KV
from idp_jax.models.config import RopeConfig
from tests.helpers import close, keep, tiny_decoder, tiny_ids

LLAMA3 = (
    ("factor", 4.0),
    ("high_freq_factor", 4.0),
    ("low_freq_factor", 1.0),
    ("original_max_position_embeddings", 32.0),
)
# Dynamic RoPE scaling is left out throughout: by definition it changes every position's angle with
# the length of the longest row, so other rows and a split into past and rest do have an effect.
VARIANTS = {
    "llama": lambda: tiny_decoder("llama", rope=RopeConfig(10000.0, "llama3", LLAMA3), head_dim=24),
    "opt": lambda: tiny_decoder("opt", norm_before=False, final_norm=False, embedding_dim=32),
}


@pytest.fixture(scope="module", params=sorted(VARIANTS))
def model(request):
    return VARIANTS[request.param]()


def test_rows_do_not_depend_on_each_other(model):
    ids = tiny_ids(model, batch=3, time=9)
    logits = model(ids)
    assert close(logits[1:2], model(ids[1:2]))


def test_logits_are_float32_and_differ_between_tokens(model):
    logits = model(tiny_ids(model))
    assert logits.dtype == jnp.float32
    assert float(jnp.std(logits)) > 0.1


def test_padding_on_either_side_has_no_effect(model):
    """One row, shifted through a wider batch: padded right, on both sides, and left."""
    ids = tiny_ids(model, batch=1, time=6)
    rows = jnp.concatenate([jnp.pad(ids, [(0, 0), (k, 3 - k)]) for k in range(4)])
    logits, alone = model(rows, (rows > 0).astype(jnp.int32)), model(ids)
    assert all(close(logits[k, k : k + 6], alone[0]) for k in range(4))
    # What the padding holds does not matter either.
    filled = jnp.where(rows > 0, rows, 7)
    assert close(model(filled, (rows > 0).astype(jnp.int32))[2, 2:8], alone[0])


def test_later_tokens_do_not_reach_earlier_ones(model):
    ids = tiny_ids(model, batch=2, time=10)
    other = ids.at[:, 6:].set((ids[:, 6:] + 5) % model.config.vocab_size)
    before, after = model(ids), model(other)
    assert close(before[:, :6], after[:, :6], 0.0)
    assert not close(before[:, 6:], after[:, 6:], 0.01)


def test_branches_score_as_if_each_were_alone(model):
    context, first, second = (tiny_ids(model, batch=2, time=t, seed=t) for t in (7, 3, 4))
    row = jnp.concatenate([context, first, second], 1)
    mask = jnp.broadcast_to(jnp.asarray([1] * 7 + [2] * 3 + [3] * 4, jnp.int32), row.shape)
    logits = model(row, mask)
    alone_first = model(jnp.concatenate([context, first], 1))
    alone_second = model(jnp.concatenate([context, second], 1))
    assert close(logits[:, :10], alone_first)
    assert close(logits[:, 10:], alone_second[:, 7:])


def test_branches_with_padding_and_past(model):
    start, context, first, second = (tiny_ids(model, batch=1, time=t, seed=t) for t in (4, 5, 3, 2))
    _, past = keep(model, start)
    row = jnp.concatenate([jnp.zeros((1, 2), jnp.int32), context, first, second], 1)
    mask = jnp.asarray([[0, 0] + [1] * 5 + [2] * 3 + [3] * 2], jnp.int32)
    logits = model(row, mask, past=past)
    alone = model(jnp.concatenate([start, context, second], 1))
    assert close(logits[:, 10:], alone[:, 9:])


def test_a_row_that_sees_nothing_is_finite(model):
    ids = tiny_ids(model)
    assert bool(jnp.isfinite(model(ids, jnp.zeros_like(ids))).all())


def test_remat_changes_nothing():
    model = tiny_decoder("opt")
    embeddings = model.embed(tiny_ids(model))

    def loss(embeddings, remat):
        return jnp.square(model.hidden(embeddings=embeddings, remat=remat)).mean()

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    expected = gradient(embeddings, "none")
    assert close(gradient(embeddings, "dots"), expected)
    assert close(gradient(embeddings, "layer"), expected)


def test_bfloat16_activations_stay_near_float32():
    model = tiny_decoder("llama")
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model)
    ids = tiny_ids(model)
    logits, exact = half(ids), model(ids)
    assert logits.dtype == jnp.float32
    # Eight bits of mantissa through two layers.
    assert float(jnp.abs(logits - exact).mean()) < 0.05 * float(jnp.std(exact))


@pytest.mark.parametrize("bad", [-1, 128])
def test_ids_outside_the_vocabulary_are_refused(bad):
    model = tiny_decoder("llama")
    with pytest.raises(ValueError, match=f"{bad} .*vocabulary of 128"):
        model(jnp.full((1, 2), bad, jnp.int32))


def test_learned_positions_end():
    model = tiny_decoder("opt", max_positions=16)
    _, past = keep(model, tiny_ids(model, time=6))
    assert model(tiny_ids(model, time=10), past=past).shape == (2, 10, 128)
    with pytest.raises(ValueError, match=r"17 tokens .* exceed the 16 learned positions"):
        model(tiny_ids(model, time=11), past=past)


def test_ids_must_be_a_batch():
    with pytest.raises(ValueError, match=r"must be \[B, T\]"):
        tiny_decoder("llama")(jnp.ones((3,), jnp.int32))


def test_a_past_without_slots_is_no_past(model):
    config = model.config
    empty = jnp.zeros((config.num_layers, 1, 0, config.num_kv_heads, config.head_dim), jnp.float32)
    past = KV(empty, empty, jnp.zeros((1, 0), bool), jnp.zeros((1,), jnp.int32))
    ids = tiny_ids(model)
    assert close(model(ids, past=past), model(ids))


def test_no_entry_passes_the_learned_positions():
    """What the traced entries (training, likelihoods) call has the check too, prompt included."""
    model = tiny_decoder("opt", max_positions=16)
    _, past = keep(model, tiny_ids(model, batch=1, time=6))
    ids = tiny_ids(model, time=11)
    for entry in (model.hidden, jax.jit(model.hidden)):
        assert entry(ids[:, :10], past=past).shape == (2, 10, 64)
        with pytest.raises(ValueError, match="17 tokens .prompt included. exceed the 16"):
            entry(ids, past=past)
    with pytest.raises(ValueError, match="17 tokens"):
        model.start(jnp.zeros((1, 17, 64)))
    assert jax.jit(tiny_decoder("llama", max_positions=16).hidden)(ids).shape == (2, 11, 64)


def test_a_masked_row_beyond_the_learned_positions_is_no_number():
    """Padding takes no position; a row with a token that has none is given no other's."""
    model = tiny_decoder("opt", max_positions=16)
    ids = tiny_ids(model, batch=2, time=20)
    mask = jnp.ones_like(ids).at[0, :6].set(0)
    hidden = jax.jit(model.hidden)(ids, mask)
    assert bool(jnp.isfinite(hidden[0]).all())
    assert bool(jnp.isnan(hidden[1]).all())
