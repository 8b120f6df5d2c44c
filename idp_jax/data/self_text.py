"""Text that a model writes itself, so that no dataset is needed.

The invariant: the text depends on model, seed and length alone, not on how often its writing was
interrupted: every round draws its own random numbers.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from idp_jax.inference.generation import generate
from idp_jax.models import Decoder

_ROWS = 128  # documents that the model writes at a time
_FEW = 32  # their number in the last round is a multiple of this, so that few programs are compiled
_TOP_K = 50


def sample_documents(
    model: Decoder,
    tokenizer: Any,
    tokens: int,
    *,
    document_tokens: int = 128,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
    kept: Path | None = None,
) -> list[str]:
    """Text that the model writes itself, so that no dataset is needed.

    Every document starts from a random token of the vocabulary and is sampled at temperature 1
    among the 50 likeliest, after "LLM-QAT: Data-Free Quantization Aware Training for Large Language
    Models".

    Args:
        tokens: how many to write, at least.
        document_tokens: length of a document at most; short ones are written faster.
        progress: called with tokens written and wanted.
        kept: a file that takes the text as it comes; a call that finds it there goes on behind it,
            and ends with the same text as one that was not interrupted. The caller removes it.

    Raises:
        ValueError: what was kept is damaged.
    """
    config = model.config
    special = set(tokenizer.all_special_ids)
    starts = np.array([i for i in range(config.vocab_size) if i not in special], np.int32)
    rng = np.random.default_rng(seed)
    key = jax.random.key(seed)
    length = min(document_tokens, config.max_positions) - 1
    texts, written = [], 0
    before = [] if kept is None else _read_rounds(kept)
    rounds = 0
    progress(0, tokens)
    while written < tokens:
        first = rng.choice(starts, (_rows(tokens - written, written, len(texts)), 1))
        if rounds < len(before):
            count, new = before[rounds]
        else:
            rows = generate(
                model,
                first,
                max_new_tokens=length,
                stop_ids=config.eos_token_ids,
                temperature=1.0,
                top_k=_TOP_K,
                key=jax.random.fold_in(key, rounds),
            )
            documents = np.concatenate([first, np.asarray(rows)], 1).tolist()
            count, new = _decoded(documents, config.eos_token_ids, tokenizer)
            _keep_round(kept, count, new)
        written += count
        texts += new
        rounds += 1
        progress(min(written, tokens), tokens)
    return texts


def _rows(wanted: int, written: int, documents: int) -> int:
    """Documents of the next round: about as many as are needed, by the length of those before."""
    if not written:
        return _ROWS
    needed = -(-wanted * documents // written)
    return min(_ROWS, -(-needed // _FEW) * _FEW)


def _decoded(rows: list[list[int]], stops: tuple[int, ...], tokenizer: Any):
    """How many tokens the documents have, and their texts."""
    ends = [min((row.index(stop) for stop in stops if stop in row), default=None) for row in rows]
    rows = [row[:end] for row, end in zip(rows, ends, strict=True)]
    texts = [tokenizer.decode(row, skip_special_tokens=True) for row in rows]
    return sum(map(len, rows)), texts


def _read_rounds(kept: Path) -> list[tuple[int, list[str]]]:
    """Tokens and texts of every round in the file; one that was cut off is taken out of it."""
    if not kept.is_file():
        return []
    *lines, rest = kept.read_bytes().split(b"\n")
    if rest and jax.process_index() == 0:
        with kept.open("r+b") as file:
            file.truncate(kept.stat().st_size - len(rest))
    try:
        rounds = [json.loads(line) for line in lines]
        return [(int(row["tokens"]), [str(text) for text in row["texts"]]) for row in rounds]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{kept} is damaged; remove it, and its text is written again") from error


def _keep_round(kept: Path | None, count: int, texts: list[str]) -> None:
    if kept is None or jax.process_index() != 0:
        return
    kept.parent.mkdir(parents=True, exist_ok=True)
    with kept.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"tokens": count, "texts": texts}) + "\n")
