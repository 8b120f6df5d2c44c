"""Rows that end make room for the next prompt, and nobody's text changes by that."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idp_jax.inference import complete, generate
from idp_jax.inference.continuous import _admit, _step
from idp_jax.recover import PrefixAdapter
from tests.helpers import tiny_decoder, tiny_pool, tiny_tokenizer

TEXTS = ["tide", "the keeper of the lamp", "a", "storm and rock", "ship"]
TOKENIZER = tiny_tokenizer()
PROMPTS = [TOKENIZER(text)["input_ids"] for text in TEXTS]


def speaking(architecture="llama", **overrides):
    return tiny_decoder(architecture, vocab_size=259, **overrides)


def pool(model):
    return tiny_pool(model, 3, 5).repair(model)


MODELS = {
    "llama": speaking,
    "opt-pool": lambda: pool(speaking("opt")),
    "llama-pool": lambda: pool(speaking()),
    "llama-prefix": lambda: PrefixAdapter.init(speaking(), 4, jax.random.key(0)).repair(speaking()),
}


def completed(model, prompts, **settings):
    """What each prompt is continued by; the pieces are its text."""
    pieces, found = [""] * len(prompts), [None] * len(prompts)
    for number, new, done in complete(model, TOKENIZER, prompts, **settings):
        assert found[number] is None
        pieces[number] += new
        found[number] = done
    assert pieces == [done.text for done in found]
    return found


@pytest.mark.parametrize("model", MODELS)
def test_greedy_text_is_that_of_generate(model):
    model = MODELS[model]()
    stop = int(generate(model, [PROMPTS[0]], max_new_tokens=4)[0, 3])
    found = completed(model, PROMPTS, max_new_tokens=9, batch_size=2, stop_ids=[stop])
    for prompt, done in zip(PROMPTS, found, strict=True):
        row = generate(model, [prompt], max_new_tokens=9, stop_ids=[stop])[0].tolist()
        ended = stop in row
        row = row[: row.index(stop)] if ended else row
        assert done.text == TOKENIZER.decode(row, skip_special_tokens=True)
        assert done.finish_reason == ("stop" if ended else "length")
        assert done.tokens == len(row) + ended
    assert found[0].finish_reason == "stop"  # so that a row was filled anew


@pytest.mark.parametrize("top", [{}, {"top_k": 20, "top_p": 0.9}])
def test_a_prompt_and_a_seed_give_one_text(top):
    model = pool(speaking())
    settings = {"max_new_tokens": 12, "temperature": 1.5, "seed": 3, **top}
    together = completed(model, PROMPTS, batch_size=3, **settings)
    turned = completed(model, PROMPTS[::-1], batch_size=2, **settings)[::-1]
    alone = [completed(model, [prompt], **settings)[0] for prompt in PROMPTS]
    assert together == turned == alone
    assert together != completed(model, PROMPTS, **{**settings, "seed": 4})
    mask = lambda prompt: jnp.ones((1, len(prompt)), jnp.int32)
    for prompt, done in zip(PROMPTS, together, strict=True):
        ids = jnp.asarray([prompt], jnp.int32)
        assert done.choice == int(model.choose(ids, mask(prompt))[0])


def test_a_stop_string_ends_a_text_before_it():
    model = speaking()
    whole = completed(model, PROMPTS[:2], max_new_tokens=16)
    string = whole[0].text[3:5]
    stopped = completed(model, PROMPTS[:2], max_new_tokens=16, stop=["never met", string])
    assert stopped[0].text == whole[0].text[: whole[0].text.index(string)]
    assert stopped[0].finish_reason == "stop" and stopped[0].tokens < 16


def test_a_step_is_compiled_once():
    model = speaking(num_layers=1)
    before = _step._cache_size(), _admit._cache_size()
    completed(model, PROMPTS, max_new_tokens=40, batch_size=2)
    completed(model, PROMPTS[::-1], max_new_tokens=35, batch_size=2)
    assert (_step._cache_size() - before[0], _admit._cache_size() - before[1]) == (1, 1)


def test_nothing_to_do_and_what_cannot_be_done():
    model = speaking("opt")
    assert completed(model, [], max_new_tokens=3) == []
    with pytest.raises(ValueError, match="prompt 1: 300 tokens .* 256 learned positions"):
        completed(model, [[5], [5] * 297], max_new_tokens=3)
    with pytest.raises(ValueError, match="prompt 0: every prompt needs a last token"):
        completed(model, [[]], max_new_tokens=3)
    with pytest.raises(ValueError, match="max_new_tokens 0 must be at least 1"):
        completed(model, PROMPTS, max_new_tokens=0)
    model = speaking()  # whose head is another matrix
    model.embedding = model.embedding[...].at[PROMPTS[2][-1]].set(np.inf)
    with pytest.raises(ValueError, match="the logits behind prompt 2 are not finite"):
        completed(model, [[5], [6], PROMPTS[2]], max_new_tokens=1)
