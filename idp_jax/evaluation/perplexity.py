"""Perplexity by the protocol of the compression papers, to compare with published tables.

The text is tokenised once as a whole and cut into windows of T tokens that do not overlap. Nothing
carries over from window to window; each gives T - 1 next-token losses, and the perplexity is exp of
their mean over all windows.
"""

import hashlib
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

import jax
import numpy as np

from idp_jax.data.tokens import token_ids
from idp_jax.data.windows import cut, keep_windows
from idp_jax.evaluation.journal import Journal
from idp_jax.evaluation.results import NOT_FINITE, PerplexityResult
from idp_jax.evaluation.statistics import exponential, perplexity_interval
from idp_jax.models import Decoder
from idp_jax.models.likelihood import token_scores
from idp_jax.processes import gather
from idp_jax.recover import Repaired
from idp_jax.sharding import filled_rows


def windows_from_text(
    tokenizer: Any, text: str | Iterable[str], length: int, count: int | None = None
) -> np.ndarray:
    """Cuts a text into windows of tokens; what is left over at the end is dropped.

    Args:
        tokenizer: a transformers tokenizer; its own special tokens are added once, at the start of
          the text.
        text: the text, or its pieces in order; no more of them is read than the windows need.
        length: tokens of a window.
        count: keep only the first so many windows.

    Returns:
        int32 [W, length].

    Raises:
        ValueError: the text is shorter than one window, or than `count` windows.
    """
    if length < 2:
        raise ValueError(f"a window of {length} tokens predicts nothing; use 2 or more")
    ids = token_ids(tokenizer, [text] if isinstance(text, str) else text)
    found = keep_windows(islice(cut(ids, length), count), length)
    if len(found) < (count or 1):
        raise ValueError(
            f"the text has {len(found)} windows of {length} tokens, {count or 1} are asked for; "
            "give more text or shorter windows"
        )
    return found


def token_logprobs(repaired: Repaired, tokens) -> jax.Array:
    """The log-probability of every token of windows [B, T] but the first, [B, T - 1] (traceable).

    A pool chooses its prompt from the whole window.
    """
    past = repaired.past(tokens, jax.numpy.ones_like(tokens))
    hidden = repaired.decoder.hidden(tokens, past=past)
    logprob, _ = token_scores(repaired.decoder, hidden[:, :-1], tokens[:, 1:])
    return logprob


@jax.jit
def _window_losses(repaired: Repaired, tokens) -> jax.Array:
    return -token_logprobs(repaired, tokens).mean(-1)


def perplexity(
    repaired: Repaired | Decoder,
    windows: np.ndarray,
    batch_size: int = 4,
    progress: Callable = iter,
    journal: Journal | None = None,
) -> PerplexityResult:
    """Perplexity on windows of tokens.

    Args:
        windows: int [W, T], from `windows_from_text`.
        batch_size: windows scored at a time, more where a mesh shares them; it does not change the
            result.
        progress: wraps the list of batches, for a progress bar.
        journal: of batches that are known already.

    Raises:
        ValueError: windows are not [W, T] with T >= 2, hold ids outside the vocabulary or are
            longer than learned positions allow; or a loss is not finite.
    """
    repaired = Repaired.of(repaired)
    windows = np.asarray(windows, np.int32)
    if windows.ndim != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise ValueError(f"windows must be [W, T] with T >= 2, got shape {windows.shape}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    repaired.decoder.check(windows, repaired.prefix)
    count, length = windows.shape
    batch_size = filled_rows(min(batch_size, count))
    journal, losses = journal or Journal(), []
    for start in progress(range(0, count, batch_size)):
        # The last batch is filled up with window 0, so that one compilation serves all.
        rows = np.arange(start, start + batch_size)
        batch = windows[np.where(rows < count, rows, 0)]
        compute = lambda batch=batch: np.asarray(
            gather(_window_losses(repaired, batch)), np.float64
        ).tolist()
        losses += journal(compute, "perplexity", batch)
        _check_finite(losses[start:count], start)
    per_window = np.asarray(losses[:count])
    mean, interval = float(per_window.mean()), perplexity_interval(losses[:count])
    return PerplexityResult(
        perplexity=exponential(mean),
        mean_nll=mean,
        tokens=count * (length - 1),
        windows=count,
        per_window_nll=per_window.tolist(),
        digest=hashlib.sha256(np.ascontiguousarray(windows).data).hexdigest()[:16],
        interval=None if interval is None else (interval.low, interval.high),
    )


def _check_finite(losses: list[float], first: int) -> None:
    """Refuses the loss of a window, the first of which is number `first`, that is no number."""
    bad = np.flatnonzero(~np.isfinite(losses))
    if len(bad):
        raise ValueError(f"the loss of window {first + bad[0]} is {losses[bad[0]]}: {NOT_FINITE}")
