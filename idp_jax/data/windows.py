"""Windows of tokens: documents joined by blank lines and cut without gaps.

Every position is real text. The same documents and tokenizer always give the same windows.
"""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np

from idp_jax.data.text import join_documents

_DOCUMENTS_AT_A_TIME = 256


def windows(texts: Iterator[str], tokenizer: Any, length: int) -> Iterator[np.ndarray]:
    """Cuts documents into windows of int32 [length]; the tail that fills no window is dropped.

    The tokenizer's own special tokens come once per 256 documents.
    """
    rest = np.zeros(0, np.int32)
    texts = iter(texts)
    while chunk := list(islice(texts, _DOCUMENTS_AT_A_TIME)):
        text = join_documents(chunk) + "\n\n"
        rest = np.concatenate(
            [rest, np.asarray(tokenizer(text, verbose=False)["input_ids"], np.int32)]
        )
        full = len(rest) // length
        yield from rest[: full * length].reshape(full, length)
        rest = rest[full * length :]


def take_windows(
    texts: Iterator[str], tokenizer: Any, length: int, count: int, origin: str
) -> np.ndarray:
    """The first `count` windows, int32 [count, length].

    Raises:
        ValueError: the text holds fewer.
    """
    taken = list(islice(windows(texts, tokenizer, length), count))
    if len(taken) < count:
        raise ValueError(
            f"{origin} gives {len(taken)} of the {count} windows of {length} tokens asked for; "
            "give more text, fewer samples or a shorter sequence length"
        )
    return np.stack(taken)
