"""Tokens of a text of any length, in the memory that a piece of it takes.

A tokenizer needs some 200 bytes for every byte of its text, so a long text is cut into pieces that
overlap. The invariant: the ids are those of the whole text, bit for bit. Two neighbours must give
the same tokens at the same places all through the middle of their overlap, and are joined there
between two words. That is exact because

  - what splits a text into words reads it from left to right and looks a few characters ahead, so
    that after the end of a word it goes on as if the text began there;
  - words are tokenised one by one.

Where there are no words (LLaMA's tokenizer takes the whole text for one, and so does any with a
line of a million letters), pieces of a BPE may be joined between any two tokens: no merge reaches
over the border of two final tokens, so what stands after it is merged as if nothing came before.
What comes after a piece's end reaches back by few characters; the agreement shows that it ends
within the overlap. A text whose pieces do not agree is taken in longer ones, in the end as a whole,
as by tokenizers that cannot say where their tokens are.
"""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

_PIECE = 2**16  # characters
_OVERLAP = 2**13
_MARGIN = _OVERLAP // 4  # at either end of an overlap, where its neighbours may differ


class _Piece(NamedTuple):
    """Tokens of a piece of text: int arrays [N] of ids, places (characters) and words."""

    ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    words: np.ndarray


def token_ids(tokenizer: Any, pieces: Iterable[str]) -> Iterator[np.ndarray]:
    """The ids `tokenizer(text)["input_ids"]` of a text that comes in pieces.

    Args:
        tokenizer: a transformers tokenizer; its own special tokens are added once.

    Returns:
        int32 arrays, to be put behind one another; no more of the text is read than they need.
    """
    chunks = _chunks(pieces)
    text = next(chunks, "")
    if not getattr(tokenizer, "is_fast", False):
        # verbose=False: a text longer than the model's context is expected here.
        whole = tokenizer("".join([text, *chunks]), verbose=False)["input_ids"]
        yield np.asarray(whole, np.int32)
        return
    piece, begin = _tokenise(tokenizer, text), 0
    for more in chunks:
        start = _border(piece, len(text) - _OVERLAP)
        following = text[start:] + more
        other = _tokenise(tokenizer, following)
        joint = _joint(piece, other, start, len(text), _is_bpe(tokenizer))
        if joint is None:
            longer = [text, more, *islice(chunks, len(text) // _PIECE)]
            text = "".join(longer)
            piece = _tokenise(tokenizer, text)
            continue
        yield piece.ids[begin : joint[0]]
        text, piece, begin = following, other, joint[1]
    yield piece.ids[begin:]


def _chunks(pieces: Iterable[str]) -> Iterator[str]:
    """The same text in pieces of `_PIECE` characters or some more, the last one as it comes."""
    parts, length = [], 0
    for piece in pieces:
        for start in range(0, len(piece), _PIECE):
            parts.append(piece[start : start + _PIECE])
            length += len(parts[-1])
            if length >= _PIECE:
                yield "".join(parts)
                parts, length = [], 0
    if parts:
        yield "".join(parts)


def _tokenise(tokenizer: Any, text: str) -> _Piece:
    found = tokenizer(text, verbose=False)[0]
    places = np.asarray(found.offsets, np.int64).reshape(-1, 2)
    words = [-1 if word is None else word for word in found.word_ids]
    return _Piece(
        np.asarray(found.ids, np.int32), places[:, 0], places[:, 1], np.asarray(words, np.int64)
    )


def _border(piece: _Piece, place: int) -> int:
    """The last end of a word up to a place, or that of a token where the word is long."""
    last = np.append(np.diff(piece.words) != 0, False)
    of_token = piece.ends[piece.ends <= place].max(initial=0)
    of_word = piece.ends[last & (piece.ends <= place)].max(initial=0)
    return int(of_word if of_word > place - _OVERLAP else of_token)


def _joint(
    piece: _Piece, other: _Piece, start: int, stop: int, any_token: bool
) -> tuple[int, int] | None:
    """The numbers of the token at which `other` takes over from `piece`, in either.

    Args:
        start: the place in the text of `piece` where that of `other` begins.
        stop: where the text of `piece` ends.
        any_token: whether they may be joined within a word.

    Returns:
        None where they do not agree.
    """
    lowest, highest = start + _MARGIN, stop - _MARGIN
    ours = np.flatnonzero((piece.starts >= lowest) & (piece.starts < highest))
    theirs = np.flatnonzero((other.starts >= lowest - start) & (other.starts < highest - start))
    if len(ours) != len(theirs) or len(ours) < 2:
        return None
    agree = (
        (piece.ids[ours] == other.ids[theirs])
        & (piece.starts[ours] == other.starts[theirs] + start)
        & (piece.ends[ours] == other.ends[theirs] + start)
    )
    if not agree.all():
        return None
    begins = np.diff(piece.words[ours]) != 0
    if ((np.diff(other.words[theirs]) != 0) != begins).any():
        return None
    possible = np.flatnonzero(begins) + 1
    if not len(possible) and any_token:
        possible = np.arange(len(ours))
    if not len(possible):
        return None
    middle = possible[len(possible) // 2]
    return int(ours[middle]), int(theirs[middle])


def _is_bpe(tokenizer: Any) -> bool:
    from tokenizers.models import BPE

    return isinstance(tokenizer.backend_tokenizer.model, BPE)
