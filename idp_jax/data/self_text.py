"""Text that a model writes itself, so that no dataset is needed."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from idp_jax.inference.generation import generate
from idp_jax.models import Decoder

_ROWS = 128  # documents that the model writes at a time
_TOP_K = 50


def sample_documents(
    model: Decoder,
    tokenizer: Any,
    tokens: int,
    *,
    document_tokens: int = 128,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[str]:
    """Text that the model writes itself, so that no dataset is needed.

    Every document starts from a random token of the vocabulary and is sampled at temperature 1
    among the 50 likeliest, after "LLM-QAT: Data-Free Quantization Aware Training for Large Language
    Models".

    Args:
        tokens: how many to write, at least.
        document_tokens: length of a document at most; short ones are written faster.
        progress: called with tokens written and wanted.
    """
    config = model.config
    special = set(tokenizer.all_special_ids)
    starts = np.array([i for i in range(config.vocab_size) if i not in special], np.int32)
    rng = np.random.default_rng(seed)
    key = jax.random.key(seed)
    length = min(document_tokens, config.max_positions) - 1
    texts, written, rounds = [], 0, 0
    while written < tokens:
        first = rng.choice(starts, (_ROWS, 1))
        rows = generate(
            model,
            first,
            max_new_tokens=length,
            stop_ids=config.eos_token_ids,
            temperature=1.0,
            top_k=_TOP_K,
            key=jax.random.fold_in(key, rounds),
        )
        for row in np.concatenate([first, np.asarray(rows)], 1).tolist():
            ends = [row.index(stop) for stop in config.eos_token_ids if stop in row]
            row = row[: min(ends, default=len(row))]
            written += len(row)
            texts.append(tokenizer.decode(row, skip_special_tokens=True))
        rounds += 1
        progress(min(written, tokens), tokens)
    return texts
