"""From text to rows of ids, and back."""

from collections.abc import Sequence
from typing import Any

import numpy as np


def is_text(prompts: Any) -> bool:
    """Whether prompts are a text or several, and not ids."""
    return isinstance(prompts, str) or (
        isinstance(prompts, list | tuple) and len(prompts) > 0 and isinstance(prompts[0], str)
    )


def encode(tokenizer: Any, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask, int32 [B, T], of texts, padded on the left.

    Raises:
        ValueError: a text has no tokens.
    """
    rows = [tokenizer(text, verbose=False)["input_ids"] for text in texts]
    empty = [text for text, row in zip(texts, rows, strict=True) if not row]
    if empty:
        raise ValueError(f"the prompt {empty[0]!r} has no tokens; give text to continue")
    longest = max(map(len, rows))
    ids = np.zeros((len(rows), longest), np.int32)
    mask = np.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, longest - len(row) :] = row
        mask[index, longest - len(row) :] = 1
    return ids, mask


def decode(tokenizer: Any, rows: np.ndarray, stop_ids: Sequence[int]) -> list[str]:
    """The text of every row up to the token that stopped it."""
    texts = []
    for row in rows.tolist():
        ends = [row.index(stop) for stop in stop_ids if stop in row]
        texts.append(tokenizer.decode(row[: min(ends, default=len(row))], skip_special_tokens=True))
    return texts
