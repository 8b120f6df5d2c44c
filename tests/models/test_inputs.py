"""A model is called with what is at hand: arrays, lists, or what a tokenizer returns."""

import jax.numpy as jnp
import numpy as np
import pytest

from idp_jax.recover import Repaired
from tests.helpers import tiny_decoder, tiny_tokenizer

TEXTS = ["two words", "one"]


@pytest.fixture(scope="module", params=["bare", "repaired"])
def model(request):
    model = tiny_decoder("llama", vocab_size=259)
    return model if request.param == "bare" else Repaired(model)


@pytest.mark.parametrize("tensors", [None, "np"], ids=["lists", "arrays"])
def test_what_a_tokenizer_returns(model, tensors):
    encoded = tiny_tokenizer()(TEXTS, padding=True, return_tensors=tensors)
    ids, mask = (jnp.asarray(encoded[name]) for name in ("input_ids", "attention_mask"))
    assert int(mask.sum()) == 9 + 3 < mask.size
    np.testing.assert_array_equal(model(encoded), model(ids, mask))
    np.testing.assert_array_equal(model(dict(encoded)), model(ids, mask))


def test_a_mapping_without_a_mask_and_a_mask_of_one_s_own(model):
    encoded = tiny_tokenizer()(TEXTS, padding=True)
    ids = encoded["input_ids"]
    np.testing.assert_array_equal(model({"input_ids": ids}), model(ids))
    ones = np.ones_like(ids)
    np.testing.assert_array_equal(model(encoded, ones), model(ids, ones))


def test_rows_of_different_lengths_are_refused(model):
    with pytest.raises(ValueError, match=r"rows of 3 and 9 tokens .*padding=True"):
        model(tiny_tokenizer()(TEXTS))
    with pytest.raises(ValueError, match=r"must be \[B, T\], got shape \(3,\)"):
        model(tiny_tokenizer()("one"))
