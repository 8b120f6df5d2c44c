"""Documents in one row: each sees the past and itself, and is as if it were alone."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idp_jax.models import KV
from idp_jax.models.layers import visibility
from idp_jax.recover import LoraAdapter, PrefixAdapter, SoftPrompt
from tests.helpers import close, keep, quantize_decoder, tiny_decoder, tiny_ids

FIRST, SECOND = 150, 60  # tokens: the second document begins within the second block of queries
SEGMENTS = jnp.asarray([[0] * FIRST + [3] * SECOND] * 2, jnp.int32)
MODELS = {
    "llama": lambda: tiny_decoder("llama"),
    "opt": lambda: tiny_decoder("opt", norm_before=False, final_norm=False, embedding_dim=32),
    "packed": lambda: quantize_decoder(tiny_decoder("llama")),
    "bfloat16": lambda: jax.tree.map(lambda x: x.astype(jnp.bfloat16), tiny_decoder("llama")),
}


OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in ("bfloat16", "opt", "packed")]


@pytest.fixture(scope="module", params=["llama", *OTHERS])
def model(request):
    return MODELS[request.param]()


def shared_past(decoder) -> KV:
    """Five tokens before all rows."""
    return keep(decoder, tiny_ids(decoder, batch=1, time=5, seed=3))[1]


def pasts(decoder) -> dict[str, KV | None]:
    """Nothing before the rows, one past for all, and one of its own for each row."""
    own = keep(decoder, tiny_ids(decoder, batch=2, time=4, seed=4))[1]
    return {"none": None, "shared": shared_past(decoder), "own": own}


@jax.jit
def packed_logits(decoder, ids, segments, past):
    return decoder.logits(decoder.hidden(ids, past=past, segments=segments))


@partial(jax.jit, static_argnames="remat")
def gradients(decoder, past, *, remat="dots"):
    """Of the first and of the second document's loss by all embeddings, [2, B, T, E]."""

    def losses(embeddings):
        hidden = decoder.hidden(embeddings=embeddings, past=past, segments=SEGMENTS, remat=remat)
        squares = jnp.square(decoder.logits(hidden)).mean((0, 2))
        return jnp.stack([squares[:FIRST].mean(), squares[FIRST:].mean()])

    return jax.jacrev(losses)(decoder.embed(tiny_ids(decoder, time=FIRST + SECOND)))


@pytest.mark.parametrize(
    ("before", "remat"), [("none", "dots"), ("shared", "dots"), ("own", "none"), ("own", "layer")]
)
def test_no_gradient_reaches_another_document(model, before, remat):
    first, second = np.asarray(gradients(model, pasts(model)[before], remat=remat), np.float32)
    assert not second[:, :FIRST].any() and np.abs(second[:, FIRST:]).max(-1).all()
    assert not first[:, FIRST:].any() and np.abs(first[:, :FIRST]).max(-1).all()


@pytest.mark.parametrize("kind", ["prompt", "prefix", "lora"])
def test_no_gradient_reaches_another_document_beside_an_adapter(kind):
    decoder, key = tiny_decoder("llama"), jax.random.key(0)
    adapter = {
        "prompt": lambda: SoftPrompt.init(decoder, 6, key),
        "prefix": lambda: PrefixAdapter.init(decoder, 6, key),
        "lora": lambda: jax.tree.map(lambda x: x + 0.1, LoraAdapter.init(decoder, 2, key)),
    }[kind]()
    repaired = adapter.repair(decoder)
    first, second = np.asarray(gradients(repaired.decoder, repaired.prefix))
    assert not second[:, :FIRST].any() and second[:, FIRST:].any()
    assert not first[:, FIRST:].any() and first[:, :FIRST].any()

    def loss(adapter):  # while the adapter itself is reached from both
        repaired = adapter.repair(decoder)
        ids = tiny_ids(decoder, time=FIRST + SECOND)
        hidden = repaired.decoder.hidden(ids, past=repaired.prefix, segments=SEGMENTS)
        return jnp.stack([jnp.square(hidden[:, :FIRST]).sum(), jnp.square(hidden[:, FIRST:]).sum()])

    for leaf in jax.tree.leaves(jax.jit(jax.jacrev(loss))(adapter)):
        assert np.asarray(jnp.abs(leaf).reshape(2, -1).max(-1) > 0).all()


@pytest.mark.parametrize("before", ["none", "shared", "own"])
def test_a_packed_document_has_the_logits_of_one_alone(model, before):
    past = pasts(model)[before]
    ids = tiny_ids(model, time=FIRST + SECOND)
    packed = packed_logits(model, ids, SEGMENTS, past)
    alone = [model(part, past=past) for part in (ids[:, :FIRST], ids[:, FIRST:])]
    # bfloat16 sums in another order are other numbers.
    tolerance = 1e-5 if model.embedding.dtype == jnp.float32 else 0.1
    assert close(packed[:, :FIRST], alone[0], tolerance)
    assert close(packed[:, FIRST:], alone[1], tolerance)
    assert not close(packed[:, FIRST:], model(ids, past=past)[:, FIRST:], 2 * tolerance)


def test_positions_restart_behind_the_past():
    """OPT's are learned: document by document they may use them all, and no more."""
    model = tiny_decoder("opt", max_positions=16)
    past = keep(model, tiny_ids(model, batch=1, time=6))[1]
    ids = tiny_ids(model, time=24)
    fits = jnp.asarray([[0] * 10 + [1] * 10 + [2] * 4] * 2, jnp.int32)
    model.check(ids, past, fits)
    packed = packed_logits(model, ids, fits, past)
    assert close(packed[:, 10:20], model(ids[:, 10:20], past=past), 1e-5)
    with pytest.raises(ValueError, match=r"19 tokens .* exceed the 16 learned positions"):
        model.check(ids, past, jnp.asarray([[0] * 13 + [1] * 11] * 2, jnp.int32))
    too_long = jnp.asarray([[0] * 24, [0] * 10 + [1] * 10 + [2] * 4], jnp.int32)
    hidden = jax.jit(model.hidden)(ids, past=past, segments=too_long)
    assert bool(jnp.isnan(hidden[0]).all()) and bool(jnp.isfinite(hidden[1]).all())


def test_padding_and_branches_stay_within_their_document():
    mask = jnp.asarray([[0, 1, 1, 2, 3, 1, 1]], jnp.int32)
    found = visibility(mask, jnp.asarray([[0, 0, 0, 0, 0, 1, 1]], jnp.int32))[0]
    sees = [np.flatnonzero(row).tolist() for row in np.asarray(found)]
    assert sees == [[], [1], [1, 2], [1, 2, 3], [1, 2, 4], [5], [5, 6]]


def test_one_document_is_a_row_without_segments():
    model = tiny_decoder("llama")
    ids = tiny_ids(model)
    same = packed_logits(model, ids, jnp.full_like(ids, 7), None)
    assert bool((same == packed_logits(model, ids, None, None)).all())


def test_keys_and_values_of_several_documents_are_no_past():
    model = tiny_decoder("llama")
    ids = tiny_ids(model)
    with pytest.raises(ValueError, match="several documents are no past"):
        model.hidden(ids, segments=jnp.zeros_like(ids), keep=True)
