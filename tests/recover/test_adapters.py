"""A repair computes what its definition says: the prompt before the input, the update beside W."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idp_jax.formats.source import open_config
from idp_jax.models.abstract import abstract
from idp_jax.models.config import from_hf
from idp_jax.models.decoder import Decoder
from idp_jax.models.matrices import matrices
from idp_jax.recover import LoraAdapter, Pool, PrefixAdapter, Repaired, SoftPrompt
from idp_jax.recover.methods import parameter_count
from idp_jax.recover.replaced import parameter
from idp_jax.weights import Dense
from tests.helpers import close, quantize_decoder, tiny_decoder, tiny_ids

MODELS = {
    "llama": lambda: tiny_decoder("llama"),
    "opt": lambda: tiny_decoder("opt"),
    "opt-projected": lambda: tiny_decoder("opt", embedding_dim=32),
}
KEY = jax.random.key(3)
LENGTHS = (10, 6, 6)  # tokens of the rows below


@functools.cache
def model_of(name: str) -> Decoder:
    """One model for the whole file."""
    return MODELS[name]()


def random_prompt(model: Decoder, length: int, seed: int = 0) -> SoftPrompt:
    """Nothing that stands in the vocabulary."""
    rng = np.random.default_rng(seed)
    return SoftPrompt(jnp.asarray(rng.normal(0, 0.5, (length, model.config.embedding_dim)), "f4"))


def rows(ids, lengths, side: str):
    """Rows of several lengths in one [B, T] batch, padded on one side, and their mask."""
    ids, mask = np.asarray(ids), np.zeros(ids.shape, np.int32)
    out = np.zeros_like(ids)
    for row, length in enumerate(lengths):
        place = slice(None, length) if side == "right" else slice(ids.shape[1] - length, None)
        out[row, place], mask[row, place] = ids[row, :length], 1
    return jnp.asarray(out), jnp.asarray(mask)


def real_logits(logits, mask) -> np.ndarray:
    """Logits of real tokens, [tokens, V]."""
    return np.asarray(logits)[np.asarray(mask) == 1]


@jax.jit
def concatenated(model: Decoder, prompt, ids) -> jax.Array:
    """Logits [B, T, V] of unpadded rows behind the prompt, with one plain forward pass."""
    words = model.embed(ids)
    before = jnp.broadcast_to(prompt, (ids.shape[0], *prompt.shape))
    hidden = model.hidden(embeddings=jnp.concatenate([before, words], 1))
    return model.logits(hidden)[:, prompt.shape[0] :]


@pytest.mark.parametrize("name", MODELS)
def test_soft_prompt_is_a_concatenation(name):
    model = model_of(name)
    prompt = random_prompt(model, 5)
    repaired = prompt.repair(model)
    ids = tiny_ids(model, batch=3, time=10)
    expected = np.asarray(concatenated(model, prompt.embeddings[...], ids))
    # Later tokens are not seen, so the first ones of unpadded rows are the reference.
    expected = np.concatenate([expected[i, :n] for i, n in enumerate(LENGTHS)])
    for side in ("left", "right"):
        padded, mask = rows(ids, LENGTHS, side)
        assert close(real_logits(repaired(padded, mask), mask), expected), side
    assert not close(expected, real_logits(model(padded, mask), mask), 0.1)


@pytest.mark.parametrize("name", ["llama", "opt-projected"])
def test_an_empty_prompt_changes_nothing(name):
    model = model_of(name)
    empty = SoftPrompt.init(model, 0, KEY)
    assert empty.length == 0
    ids, mask = rows(tiny_ids(model, batch=3, time=10), LENGTHS, "left")
    repaired = empty.repair(model)
    assert (real_logits(repaired(ids, mask), mask) == real_logits(model(ids, mask), mask)).all()
    assert repaired.past(ids, mask) is None


@pytest.mark.parametrize("name", ["llama", "opt-projected"])
def test_a_prefix_starts_as_the_prompt(name):
    model = model_of(name)
    prompt, prefix = SoftPrompt.init(model, 4, KEY), PrefixAdapter.init(model, 4, KEY)
    ids, mask = rows(tiny_ids(model, batch=3, time=10), LENGTHS, "left")
    expected = prompt.repair(model)(ids, mask)
    assert close(real_logits(prefix.repair(model)(ids, mask), mask), real_logits(expected, mask))
    assert prefix.k.shape == (2, 4, model.config.num_kv_heads, model.config.head_dim)


def test_a_prompt_starts_from_different_words():
    model = model_of("llama")
    words = np.asarray(SoftPrompt.init(model, 20, KEY).embeddings[...])
    table = np.asarray(model.embedding[...])
    found = [int(np.abs(table - word).sum(1).argmin()) for word in words]
    assert (table[found] == words).all() and len(set(found)) == 20
    again = SoftPrompt.init(model, 20, KEY).embeddings[...]
    other = SoftPrompt.init(model, 20, jax.random.key(4)).embeddings[...]
    assert (words == again).all() and not (words == np.asarray(other)).all()


@pytest.mark.parametrize("length", [-1, 257])
def test_prompts_beyond_the_positions_are_refused(length):
    with pytest.raises(ValueError, match=rf"{length} .*between 0 and \d+"):
        SoftPrompt.init(model_of("llama"), length, KEY)


def random_lora(model: Decoder, targets, rank: int = 3) -> LoraAdapter:
    """B is not zero, as after training; the update is about as large as the matrix."""
    rng = np.random.default_rng(5)
    a, b = {}, {}
    for name in targets:
        matrix = next(matrix for matrix in matrices(model.config) if matrix.name == name)
        bound, shape = matrix.inputs**-0.5, (2, matrix.inputs, rank)
        a[name] = jnp.asarray(rng.normal(0, bound, shape), jnp.float32)
        b[name] = jnp.asarray(rng.normal(0, 0.5, (2, rank, matrix.outputs)), jnp.float32)
    return LoraAdapter(a, b, 5.0)


@jax.jit
def merged(repaired: Repaired, ids):
    """Logits with every updated matrix written out, and the query matrices."""
    layers = repaired.decoder.layers
    dense = {}
    for name in layers.weight_names:
        weight = getattr(layers, name)
        bias = None if weight.bias is None else weight.bias[...]
        dense[name] = Dense(weight.dense(jnp.float32), bias)
    model = repaired.decoder.with_layers(layers.replace(**dense))
    return model.logits(model.hidden(ids)), dense["q"].kernel[...]


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("llama", ("q", "k", "v", "o", "gate", "up", "down")),
        ("opt", ("q", "v", "down")),
    ],
)
def test_lora_is_the_merged_matrix(name, targets):
    model = model_of(name)
    ids = tiny_ids(model)
    lora = random_lora(model, targets)
    logits = np.asarray(lora.repair(model)(ids))
    expected, kernel = merged(lora.repair(model), ids)
    # The updates are as large as the matrices, and logits reach 10.
    assert close(logits, expected, 1e-4)
    update = np.asarray(lora.a["q"][...]) @ np.asarray(lora.b["q"][...])
    assert close(kernel, np.asarray(model.layers.q.kernel[...]) + update * (5.0 / 3), 1e-5)
    assert not close(logits, model(ids), 0.1)


def test_a_fresh_lora_changes_nothing():
    model = model_of("llama")
    fresh = LoraAdapter.init(model, 3, KEY)
    assert all((b[...] == 0).all() for b in fresh.b.values())
    assert float(jnp.abs(fresh.a["q"][...]).max()) <= 64**-0.5
    ids = tiny_ids(model)
    # Another program adds in another order.
    assert close(fresh.repair(model)(ids), model(ids), 1e-5)


def test_lora_on_packed_weights():
    model = quantize_decoder(model_of("opt"), 3)
    ids = tiny_ids(model)
    repaired = random_lora(model, ("q", "down")).repair(model)
    assert repaired.decoder.layers.q.base.bits == 3
    assert close(repaired(ids), merged(repaired, ids)[0], 1e-4)


def normal(*shape: int) -> jax.Array:
    """Numbers of one size."""
    return jnp.asarray(np.random.default_rng(len(shape)).normal(0, 0.3, shape), jnp.float32)


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_a_lora_with_biases_is_the_merged_matrix_and_bias(name, bits):
    """Also where the matrix has no bias of its own, and where it is packed."""
    model = model_of(name) if bits is None else quantize_decoder(model_of(name), bits)
    plain, ids = random_lora(model, ("q", "up")), tiny_ids(model)
    bias = {"q": normal(2, 64), "up": normal(2, 96)}
    lora = LoraAdapter(dict(plain.a), dict(plain.b), plain.alpha, bias=bias)
    layers = lora.repair(model).decoder.layers
    for matrix, value in bias.items():
        old = getattr(model.layers, matrix).bias
        expected = value * (5.0 / 3) + (0 if old is None else old[...])
        assert close(getattr(layers, matrix).bias[...], expected, 1e-6)
    repaired = lora.repair(model)
    assert close(repaired(ids), merged(repaired, ids)[0], 1e-4)
    assert not close(repaired(ids), plain.repair(model)(ids), 0.05)


@pytest.mark.parametrize("bits", [None, 3])
def test_replaced_parameters_stand_in_the_model(bits):
    model = model_of("opt") if bits is None else quantize_decoder(model_of("opt"), bits)
    replaced = {
        "embedding": normal(128, 64),
        "head.kernel": normal(64, 128),  # of a tied model
        "positions": normal(258, 64),
        "final_norm.bias": normal(64),
        "layers.mlp_norm.scale": normal(2, 64),
        "layers.up.kernel": normal(2, 64, 96),
        "layers.o.bias": normal(2, 64),
    }
    ids = tiny_ids(model)
    before = np.asarray(model(ids))
    found = LoraAdapter({}, {}, 1.0, replaced=replaced).repair(model).decoder
    for path, value in replaced.items():
        assert (np.asarray(parameter(found, path)) == np.asarray(value)).all(), path
    assert (found.layers.up.bias[...] == model.layers.up.bias[...]).all()
    assert not close(found(ids), before, 0.1)
    assert (np.asarray(model(ids)) == before).all() and model.head is None
    for path in ("layers.q.kernel", "layers.attention_norm.bias", "final_norm.scale"):
        assert (np.asarray(parameter(found, path)) == np.asarray(parameter(model, path))).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"targets": ("q", "gate")}, "no matrix 'gate' .*q, k, v, o, up, down"),
        ({"targets": ()}, "at least one matrix"),
        ({"rank": 0}, "rank 0 .*at least 1"),
    ],
)
def test_lora_that_does_not_fit(settings, message):
    with pytest.raises(ValueError, match=message):
        LoraAdapter.init(model_of("opt"), **{"rank": 2, "key": KEY, **settings})


def test_a_repaired_model_checks_its_input():
    model = model_of("opt")
    repaired = random_prompt(model, 6).repair(model)
    with pytest.raises(ValueError, match="token id 128 is outside the vocabulary of 128"):
        repaired([[128]])
    with pytest.raises(ValueError, match=r"257 tokens \(prompt included\) exceed the 256"):
        repaired(np.ones((1, 251), np.int32))


@pytest.mark.parametrize(
    ("start", "count"),
    [
        (lambda model: SoftPrompt.init(model, 50, KEY), 204_800),
        (lambda model: PrefixAdapter.init(model, 50, KEY), 50 * 262_144),
        (lambda model: LoraAdapter.init(model, 8, KEY), 4_194_304),
        (lambda model: Pool([SoftPrompt.init(model, n, KEY) for n in (25, 100)]), 125 * 4_096),
    ],
    ids=["prompt", "prefix", "lora", "pool"],
)
def test_parameter_counts_of_llama_7b(start, count):
    folder = Path(__file__).parents[2] / "configs/models/llama-7b"
    llama_7b = abstract(from_hf(open_config(folder)))
    assert parameter_count(jax.eval_shape(start, llama_7b)) == count
