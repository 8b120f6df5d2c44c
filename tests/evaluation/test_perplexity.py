"""Perplexity against the plain definition, and the published protocol on a real model."""

import numpy as np
import pytest

from idp_jax.evaluation.perplexity import _window_losses, perplexity, windows_from_text
from idp_jax.models import likelihood as scoring
from tests.datasets import DATA, needs_data
from tests.helpers import needs_smollm2, tiny_decoder, tiny_ids, tiny_pool, tiny_tokenizer


def plain_losses(model, windows):
    logits = np.asarray(model(windows), np.float64)[:, :-1]
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -np.take_along_axis(logprobs, np.asarray(windows)[:, 1:, None], -1)[..., 0]


@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_equals_the_definition(architecture, monkeypatch):
    monkeypatch.setattr(scoring, "POSITIONS_AT_ONCE", 7)
    model = tiny_decoder(architecture)
    windows = tiny_ids(model, 5, 12)
    losses = plain_losses(model, windows)
    result = perplexity(model, windows, 2)
    assert result.mean_nll == pytest.approx(losses.mean(), rel=1e-5)
    assert result.perplexity == pytest.approx(np.exp(losses.mean()), rel=1e-5)
    np.testing.assert_allclose(result.per_window_nll, losses.mean(1), rtol=1e-5)
    assert (result.tokens, result.windows) == (55, 5)


def test_batch_size_has_no_effect_and_compiles_once():
    model = tiny_decoder("llama")
    repaired = tiny_pool(model, 3, 5).repair(model)
    windows = tiny_ids(model, 5, 12)
    whole = perplexity(repaired, windows, 5)
    before = _window_losses._cache_size()
    parts = perplexity(repaired, windows, 2, progress=lambda batches: list(batches))
    assert _window_losses._cache_size() == before + 1
    np.testing.assert_allclose(parts.per_window_nll, whole.per_window_nll, rtol=1e-5)
    np.testing.assert_allclose(
        whole.per_window_nll, plain_losses(repaired, windows).mean(1), rtol=1e-5
    )


def test_windows_are_cut_from_one_tokenisation():
    windows = windows_from_text(tiny_tokenizer(), "abcdefgh", 3)
    assert windows.shape == (2, 3)
    assert tiny_tokenizer().decode(windows.reshape(-1)) == "abcdef"
    assert windows_from_text(tiny_tokenizer(), "abcdefgh", 3, 1).shape == (1, 3)


def test_no_more_text_is_read_than_the_windows_need():
    def pieces():
        yield "abcdefgh" * 2**15
        raise AssertionError("read on")

    assert windows_from_text(tiny_tokenizer(), pieces(), 3, 5).shape == (5, 3)


@pytest.mark.parametrize(("length", "count"), [(9, None), (3, 3), (1, None)])
def test_too_short_text_is_refused(length, count):
    with pytest.raises(ValueError, match="window"):
        windows_from_text(tiny_tokenizer(), "abcdefgh", length, count)


@pytest.mark.parametrize(
    ("windows", "batch"), [(np.zeros(3), 1), (np.zeros((2, 1)), 1), (np.zeros((2, 3)), 0)]
)
def test_bad_windows_are_refused(windows, batch):
    with pytest.raises(ValueError, match=r"windows must be|batch_size"):
        perplexity(tiny_decoder("llama"), windows, batch)


def test_ids_outside_the_vocabulary_are_refused():
    with pytest.raises(ValueError, match="outside the vocabulary"):
        perplexity(tiny_decoder("llama"), np.full((1, 4), 128))


@needs_data
@pytest.mark.slow
@needs_smollm2
@pytest.mark.usefixtures("optimised")
def test_smollm2_on_wikitext():
    """transformers gives 28.712 on the same windows of the dequantised model."""
    from idp_jax import load_model, load_tokenizer
    from idp_jax.data.text import read_text

    text = read_text(DATA / "wikitext2" / "test.jsonl")
    windows = windows_from_text(load_tokenizer("smollm2-135m"), text, 512, 40)
    result = perplexity(load_model("smollm2-135m", weights="dense"), windows, 4)
    assert result.perplexity == pytest.approx(28.712, rel=3e-3)
