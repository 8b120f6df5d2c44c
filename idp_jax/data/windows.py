"""Windows of tokens: documents joined by blank lines and cut without gaps.

Every position is real text. The same documents and tokenizer always give the same windows.
"""

import tempfile
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from idp_jax.data.text import Document, join_documents
from idp_jax.data.tokens import token_ids

_DOCUMENTS_AT_A_TIME = 256


def windows(texts: Iterable[Document], tokenizer: Any, length: int) -> Iterator[np.ndarray]:
    """Cuts documents into windows of int32 [length]; the tail that fills no window is dropped.

    The tokenizer's own special tokens come once per 256 documents.
    """
    return cut(_ids(iter(texts), tokenizer), length)


def cut(ids: Iterable[np.ndarray], length: int) -> Iterator[np.ndarray]:
    """Windows int32 [length] of ids that come in arrays; the tail is dropped."""
    rest = np.zeros(0, np.int32)
    for more in ids:
        rest = np.concatenate([rest, more])
        full = len(rest) // length
        yield from rest[: full * length].reshape(full, length)
        rest = rest[full * length :]


def _ids(texts: Iterator[Document], tokenizer: Any) -> Iterator[np.ndarray]:
    for first in texts:
        others = islice(texts, _DOCUMENTS_AT_A_TIME - 1)
        pieces = join_documents(chain([first], others))
        yield from token_ids(tokenizer, chain(pieces, ["\n\n"]))


def take_windows(
    texts: Iterable[Document], tokenizer: Any, length: int, count: int, origin: str
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


def keep_windows(
    found: Iterable[np.ndarray], length: int, folder: str | Path | None = None
) -> np.ndarray:
    """All windows, int32 [W, length], in a file without a name that goes when they do.

    Args:
        folder: where the file lies; None for the system's folder of temporary files.

    Raises:
        ValueError: they do not fit there.
    """
    try:
        if folder is not None:  # of several processes, one has made it, on its own disk perhaps
            Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            for window in found:
                file.write(window.data)
            file.flush()
            if not file.tell():
                return np.zeros((0, length), np.int32)
            return np.memmap(file, np.int32, "r").reshape(-1, length)
    except OSError as error:
        place = folder or tempfile.gettempdir()
        raise ValueError(
            f"the tokens of the text cannot be kept in {place}: {error}; make room there"
        ) from error
