"""Windows of tokens, cut without gaps from documents that are joined by blank lines or kept apart.

Every position is real text. The same documents and tokenizer always give the same windows.

A window of documents that are kept apart has a second row, which numbers them from 0. Each begins
with the tokenizer's own special tokens, as a text does that the model is given, and no blank line
stands between them. What a window's end cuts off begins the next window as a document of its own.
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


def windows(
    texts: Iterable[Document], tokenizer: Any, length: int, *, apart: bool = False
) -> Iterator[np.ndarray]:
    """Cuts documents into windows; the tail that fills no window is dropped.

    Args:
        apart: number the documents of a window instead of joining them. Joined, they have the
            tokenizer's own special tokens once per 256 documents.

    Returns:
        int32 [length]; or with `apart` [2, length], tokens and the document of each.
    """
    if not apart:
        yield from cut(_ids(iter(texts), tokenizer), length)
        return
    for tokens, numbers in cut(_numbered(texts, tokenizer), length):
        yield np.stack([tokens, numbers - numbers[0]])


def cut(ids: Iterable[np.ndarray], length: int) -> Iterator[np.ndarray]:
    """Windows int32 [..., length] of ids that come in arrays [..., n]; the tail is dropped."""
    rest = None
    for more in ids:
        rest = more if rest is None else np.concatenate([rest, more], -1)
        full = rest.shape[-1] // length * length
        for start in range(0, full, length):
            yield rest[..., start : start + length]
        rest = rest[..., full:]


def _numbered(texts: Iterable[Document], tokenizer: Any) -> Iterator[np.ndarray]:
    """Tokens of every document by itself, and its number: int32 [2, n] arrays."""
    for number, document in enumerate(texts):
        pieces = [document] if isinstance(document, str) else document
        for ids in token_ids(tokenizer, pieces):
            yield np.stack([ids, np.full_like(ids, number)])


def _ids(texts: Iterator[Document], tokenizer: Any) -> Iterator[np.ndarray]:
    for first in texts:
        others = islice(texts, _DOCUMENTS_AT_A_TIME - 1)
        pieces = join_documents(chain([first], others))
        yield from token_ids(tokenizer, chain(pieces, ["\n\n"]))


def take_windows(
    texts: Iterable[Document],
    tokenizer: Any,
    length: int,
    count: int,
    origin: str,
    *,
    apart: bool = False,
) -> np.ndarray:
    """The first `count` of `windows`, on a leading axis.

    Raises:
        ValueError: the text holds fewer.
    """
    taken = list(islice(windows(texts, tokenizer, length, apart=apart), count))
    if len(taken) < count:
        raise ValueError(
            f"{origin} gives {len(taken)} of the {count} windows of {length} tokens asked for; "
            "give more text, fewer samples or a shorter sequence length"
        )
    return np.stack(taken)


def keep_windows(
    found: Iterable[np.ndarray],
    length: int,
    folder: str | Path | None = None,
    *,
    apart: bool = False,
) -> np.ndarray:
    """All windows on a leading axis, in a file without a name that goes when they do.

    Args:
        found: int32 [length] each, or [2, length] with `apart`, as of `windows`.
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
            shape = (2, length) if apart else (length,)
            if not file.tell():
                return np.zeros((0, *shape), np.int32)
            return np.memmap(file, np.int32, "r").reshape(-1, *shape)
    except OSError as error:
        place = folder or tempfile.gettempdir()
        raise ValueError(
            f"the tokens of the text cannot be kept in {place}: {error}; make room there"
        ) from error
