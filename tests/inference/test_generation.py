"""Decoding against the plain definition: run the whole text again for every token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idp_jax.inference.buckets import bucket
from idp_jax.inference.generation import _generate, decode_step, generate, prefill
from idp_jax.models import storage
from idp_jax.models.config import RopeConfig
from idp_jax.models.storage import layers_apart
from idp_jax.recover import LoraAdapter, Repaired, SoftPrompt
from tests.helpers import close, quantize_decoder, tiny_decoder, tiny_ids, tiny_pool, tiny_tokenizer


def pool(model, lengths=(3, 5)):
    return tiny_pool(model, *lengths).repair(model)


VARIANTS = {
    "llama": lambda: tiny_decoder("llama"),
    "llama-packed": lambda: quantize_decoder(tiny_decoder("llama"), 4),
    "llama-lora": lambda: LoraAdapter.init(tiny_decoder("llama"), 2, jax.random.key(0)).repair(
        tiny_decoder("llama")
    ),
    "llama-prompt": lambda: SoftPrompt.init(tiny_decoder("llama"), 4, jax.random.key(0)).repair(
        tiny_decoder("llama")
    ),
    "llama-pool": lambda: pool(tiny_decoder("llama")),
    "opt": lambda: tiny_decoder("opt"),
    "opt-pool": lambda: pool(tiny_decoder("opt")),
}


_past = jax.jit(Repaired.past)


def plain_greedy(model, prompt, count):
    """The pool's choice is made once, from the prompt, as a stored prefix is."""
    repaired = Repaired.of(model)
    past = _past(repaired, jnp.asarray(prompt)[None], jnp.ones((1, len(prompt)), jnp.int32))
    text = list(map(int, prompt))
    for _ in range(count):
        spare = 16 - len(text)
        ids = jnp.asarray([text + [0] * spare], jnp.int32)
        mask = jnp.asarray([[1] * len(text) + [0] * spare], jnp.int32)
        text.append(int(repaired.decoder(ids, mask, past=past)[0, len(text) - 1].argmax()))
    return text[len(prompt) :]


def left_padded(ids, lengths):
    time = ids.shape[1]
    mask = np.arange(time)[None] >= time - np.asarray(lengths)[:, None]
    return np.where(mask, ids, 0), mask.astype(np.int32)


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_equals_the_definition_for_every_row(variant):
    model = VARIANTS[variant]()
    decoder = Repaired.of(model).decoder
    ids, mask = left_padded(np.asarray(tiny_ids(decoder, 3, 9)), [9, 1, 5])
    tokens = np.asarray(generate(model, ids, mask, max_new_tokens=6))
    assert tokens.shape == (3, 6) and tokens.dtype == np.int32
    for row in range(3):
        assert tokens[row].tolist() == plain_greedy(model, ids[row][mask[row] > 0], 6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_layers_one_by_one_are_the_model(variant):
    repaired = Repaired.of(VARIANTS[variant]())
    decoder = repaired.decoder
    apart = jax.jit(layers_apart)(decoder)
    assert apart is not None and len(apart) == decoder.config.num_layers
    ids = tiny_ids(decoder, 2, 5)
    _, cache = jax.jit(prefill, static_argnums=3)(repaired, ids, jnp.ones_like(ids), 1)
    step = jax.jit(decode_step)
    stacked, alone = (step(decoder, ids[:, 0], cache, 5, layers) for layers in (None, apart))
    assert close(stacked[0], alone[0])
    assert close(stacked[1].k, alone[1].k) and close(stacked[1].v, alone[1].v)


def test_layers_stay_stacked_where_there_is_no_room(monkeypatch):
    model = tiny_decoder("llama")
    monkeypatch.setattr(storage, "available_memory", lambda: 1000)
    assert layers_apart(model) is None
    monkeypatch.setattr(storage, "available_memory", lambda: None)
    assert layers_apart(model) is not None


def test_dynamic_rope_keeps_keys_as_they_were_written():
    """A longer text turns new keys by another angle, never the stored ones, as in transformers.

    Within the trained length all agree.
    """
    model = tiny_decoder("llama", rope=RopeConfig(10000.0, "dynamic", (("factor", 2.0),)))
    ids = np.asarray(tiny_ids(model, 1, 5))
    assert generate(model, ids, max_new_tokens=4)[0].tolist() == plain_greedy(model, ids[0], 4)


def test_stop_tokens_end_a_row_and_fill_it():
    model = tiny_decoder("llama")
    ids = np.asarray(tiny_ids(model, 2, 5))
    free = np.asarray(generate(model, ids, max_new_tokens=8))
    stop = int(free[0, 3])
    tokens = np.asarray(generate(model, ids, max_new_tokens=8, stop_ids=[stop]))
    for row in range(2):
        end = next((i for i, t in enumerate(free[row]) if t == stop), 8)
        assert tokens[row].tolist() == free[row, : end + 1].tolist() + [stop] * (7 - end)


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 3}])
def test_logits_that_are_not_finite_are_no_text(settings):
    """Whether at once or behind a token that the model wrote itself."""
    model = tiny_decoder("llama")
    if settings:
        settings = {**settings, "key": jax.random.key(1)}
    ids = np.asarray(tiny_ids(model, 2, 5)) * np.array([[0], [1]])
    good = np.asarray(generate(model, ids, max_new_tokens=4, **settings))
    written = int(good[1, 1])
    assert written not in [*ids.ravel(), *good[0], good[1, 0]]
    model.embedding = model.embedding[...].at[written].set(jnp.inf)
    assert (np.asarray(generate(model, ids, max_new_tokens=2, **settings)) == good[:, :2]).all()
    with pytest.raises(ValueError, match="the logits behind prompt 1 of 2 are not finite"):
        generate(model, ids, max_new_tokens=4, **settings)
    with pytest.raises(ValueError, match="prompt 0 of 1 are not finite"):
        generate(model, [[written]], max_new_tokens=1, **settings)


def test_stops_early_when_every_row_has_stopped():
    model = tiny_decoder("llama")
    ids = np.asarray(tiny_ids(model, 2, 5))
    tokens = generate(model, ids, max_new_tokens=5, stop_ids=range(128))
    assert (np.asarray(tokens) == np.asarray(tokens)[:, :1]).all()


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("count", [0, 1, 33])
def test_any_number_of_new_tokens(batch, count):
    model = tiny_decoder("llama")
    ids = np.asarray(tiny_ids(model, 2, 5))[:batch]
    long = np.asarray(generate(model, ids, max_new_tokens=34))
    assert np.array_equal(generate(model, ids, max_new_tokens=count), long[:, :count])


def test_lengths_share_a_compilation():
    model = tiny_decoder("llama", num_layers=1)
    generate(model, np.asarray(tiny_ids(model, 2, 1)), max_new_tokens=1)
    before = _generate._cache_size()
    for time, count in ((2, 3), (17, 32), (32, 20)):
        generate(model, np.asarray(tiny_ids(model, 2, time)), max_new_tokens=count, stop_ids=[time])
    assert _generate._cache_size() == before


def test_sampling_follows_the_key_and_the_probabilities():
    model = tiny_decoder("llama", vocab_size=8)
    ids = np.full((1, 3), 5, np.int32)
    draw = lambda seed, **more: np.asarray(
        generate(model, ids.repeat(2000, 0), max_new_tokens=1, key=jax.random.key(seed), **more)
    )[:, 0]
    tokens = draw(0, temperature=0.7)
    assert np.array_equal(tokens, draw(0, temperature=0.7))
    assert not np.array_equal(tokens, draw(1, temperature=0.7))
    probabilities = np.asarray(jax.nn.softmax(model(ids)[0, -1] / 0.7))
    counted = np.bincount(tokens, minlength=8) / 2000
    assert np.abs(counted - probabilities).max() < 0.05  # more than 4 standard errors
    best = set(np.argsort(probabilities)[-2:].tolist())
    assert set(draw(0, temperature=5.0, top_k=2).tolist()) == best


def test_top_k_of_one_is_greedy():
    model = tiny_decoder("llama")
    ids = np.asarray(tiny_ids(model, 2, 5))
    sampled = generate(
        model, ids, max_new_tokens=5, temperature=1.0, top_k=1, key=jax.random.key(0)
    )
    assert np.array_equal(sampled, generate(model, ids, max_new_tokens=5))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens"),
        ({"max_new_tokens": 2, "temperature": 1.0}, "random key"),
        ({"max_new_tokens": 2, "temperature": -1.0}, "temperature"),
        ({"max_new_tokens": 2, "top_k": 0}, "top_k"),
        ({"max_new_tokens": 2, "attention_mask": np.array([[1, 1, 0]])}, "last token"),
        ({"max_new_tokens": 2, "attention_mask": np.ones((1, 2))}, "must be one"),
        ({"max_new_tokens": 255}, "258 tokens"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        generate(tiny_decoder("opt"), np.full((1, 3), 5), **arguments)


def test_bad_ids_are_refused():
    with pytest.raises(ValueError, match="outside the vocabulary"):
        generate(tiny_decoder("llama"), [[1, 128]], max_new_tokens=1)
    with pytest.raises(ValueError, match="last token"):
        generate(tiny_decoder("llama"), np.zeros((1, 0)), max_new_tokens=1)


def test_padding_does_not_count_as_length():
    model = tiny_decoder("opt")
    ids, mask = left_padded(np.asarray(tiny_ids(model, 1, 300)), [3])
    assert generate(model, ids, mask, max_new_tokens=2).shape == (1, 2)


def test_buckets_cover_every_length():
    lengths = sorted({bucket(n) for n in range(2049)})
    assert len(lengths) == 20
    assert all(n <= bucket(n) <= max(32, n * 1.25 + 32) for n in range(2049))


@pytest.fixture(scope="module")
def speaking():
    """A model with a tokenizer of bytes."""
    return tiny_decoder("llama", vocab_size=259), tiny_tokenizer()


def test_text_in_text_out(speaking):
    model, tokenizer = speaking
    texts = ["tide", "the keeper", "a"]
    found = generate(model, texts, tokenizer=tokenizer, max_new_tokens=6)
    for text, written in zip(texts, found, strict=True):
        ids = np.asarray([tokenizer(text)["input_ids"]])
        tokens = generate(model, ids, max_new_tokens=6, stop_ids=[2])[0].tolist()
        tokens = tokens[: tokens.index(2)] if 2 in tokens else tokens
        assert written == tokenizer.decode(tokens, skip_special_tokens=True)
        assert generate(model, text, tokenizer=tokenizer, max_new_tokens=6) == written


def test_text_ends_before_its_stop_token(speaking):
    model, tokenizer = speaking
    ids = np.asarray([tokenizer("tide")["input_ids"]])
    tokens = generate(model, ids, max_new_tokens=6)[0].tolist()
    found = generate(model, "tide", tokenizer=tokenizer, max_new_tokens=6, stop_ids=[tokens[3]])
    assert found == tokenizer.decode(tokens[: tokens.index(tokens[3])], skip_special_tokens=True)


@pytest.mark.parametrize("tensors", ["np", None])
def test_a_tokenizers_encoding_may_be_passed(speaking, tensors):
    model, tokenizer = speaking
    encoding = tokenizer(
        ["tide", "the keeper"], padding=True, padding_side="left", return_tensors=tensors
    )
    ids, mask = encoding["input_ids"], encoding["attention_mask"]
    expected = np.asarray(generate(model, ids, mask, max_new_tokens=4))
    assert (np.asarray(generate(model, encoding, max_new_tokens=4)) == expected).all()
    for called in (model, Repaired(model)):
        assert (np.asarray(called(encoding)) == np.asarray(called(ids, mask))).all()


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ("tide", {}, "text needs a tokenizer"),
        (["tide", ""], {"tokenizer": tiny_tokenizer()}, "the prompt '' has no tokens"),
        ([[5, 6], [7]], {}, "rows of 1 and 2 tokens make no array"),
    ],
)
def test_prompts_that_cannot_be_read(speaking, prompts, settings, message):
    with pytest.raises(ValueError, match=message):
        generate(speaking[0], prompts, max_new_tokens=2, **settings)


@pytest.mark.parametrize("outside", [[128], [-1, 10**30]])
def test_a_stop_token_outside_the_vocabulary_is_never_met(outside):
    model = tiny_decoder("llama")
    ids = np.asarray(tiny_ids(model, 2, 5))
    free = np.asarray(generate(model, ids, max_new_tokens=8))
    assert np.array_equal(generate(model, ids, max_new_tokens=8, stop_ids=outside), free)
    stop = int(free[0, 3])
    stopped = generate(model, ids, max_new_tokens=8, stop_ids=[stop])
    assert np.array_equal(
        generate(model, ids, max_new_tokens=8, stop_ids=[*outside, stop]), stopped
    )
