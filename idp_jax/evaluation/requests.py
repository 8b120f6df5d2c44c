"""Scoring many (context, continuation) pairs with few rows and few compilations.

Pairs with one context share a row: the context is its trunk, and every distinct continuation a
branch behind it, which sees the trunk and itself. A continuation's last token is predicted but
never read, so a one-token answer adds nothing to the row. The invariant: scores are those of each
pair by itself, whatever the batch, the order and the other pairs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from idp_jax.inference.buckets import bucket
from idp_jax.models.likelihood import token_scores
from idp_jax.processes import gather
from idp_jax.recover import Repaired

# Beyond this, attention over other branches costs more than reading the context again.
MERGED_TOKENS = 512
ATTENTION_CELLS = 2**22  # rows * T * T at a time: 1/2 GB of float32 scores for 32 heads
_FIRST_BRANCH = 2


@dataclass(frozen=True)
class Request:
    """A continuation to be scored behind a context (both of one token or more).

    `whole`: the continuation is part of the text that a pool's prompt is chosen from.
    """

    context: list[int]
    continuation: list[int]
    whole: bool = False


@dataclass(frozen=True)
class Score:
    """The answer to a request.

    Attributes:
        logprob: the natural log of the continuation's probability.
        greedy: whether greedy decoding gives it.
        choice: the pool's prompt; None without a pool.
    """

    logprob: float
    greedy: bool
    choice: int | None


@dataclass
class _Row:
    """One row: its tokens and mask, the predictions asked of it, and whose answers they are."""

    tokens: list[int]
    mask: list[int]
    trunk_end: int
    positions: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    answers: list[tuple[list[int], int]] = field(default_factory=list)

    def add(self, continuation: Sequence[int], owners: list[int], mark: int) -> None:
        start = len(self.tokens)
        self.tokens += continuation[:-1]
        self.mask += [mark] * (len(continuation) - 1)
        self.positions += [self.trunk_end - 1, *range(start, len(self.tokens))]
        self.targets += continuation
        self.answers.append((owners, len(continuation)))


def plan_rows(requests: Sequence[Request], max_length: int) -> list[_Row]:
    """The rows that answer all requests, none longer than `max_length`.

    Requests must fit alone: len(context) + len(continuation) - 1 <= max_length.
    """
    groups: dict[tuple, dict[tuple, list[int]]] = {}
    for index, request in enumerate(requests):
        # A whole text is a trunk to its end, so it shares its row with nothing.
        key = (tuple(request.context), index if request.whole else None)
        groups.setdefault(key, {}).setdefault(tuple(request.continuation), []).append(index)
    rows = []
    for (context, alone), continuations in groups.items():
        row = None
        for continuation, owners in continuations.items():
            room = min(max_length, MERGED_TOKENS) - len(continuation) + 1
            if row is None or len(row.tokens) > room:
                row = _Row(list(context), [1] * len(context), len(context))
                rows.append(row)
            mark = 1 if alone is not None else _FIRST_BRANCH + len(row.answers)
            row.add(continuation, owners, mark)
    return rows


def score_requests(
    repaired: Repaired,
    requests: Sequence[Request],
    batch_size: int,
    max_length: int,
    progress: Callable = iter,
) -> list[Score]:
    """Scores in the order of the requests.

    Args:
        batch_size: rows at a time, fewer where rows are long.
        max_length: tokens of a row at most.
        progress: wraps the list of batches, for a progress bar.

    Raises:
        ValueError: an id outside the vocabulary.
    """
    rows = sorted(plan_rows(requests, max_length), key=lambda row: -len(row.tokens))
    if rows:
        every_id = np.concatenate([np.asarray(row.tokens + row.targets, np.int32) for row in rows])
        repaired.decoder.check(every_id[:, None])
    scores: list[Score | None] = [None] * len(requests)
    for batch, length, size in progress(_batches(rows, batch_size)):
        logprob, greedy, choice = _run(repaired, batch, length, size)
        end = 0
        for number, row in enumerate(batch):
            chosen = None if choice is None else int(choice[number])
            for owners, count in row.answers:
                start, end = end, end + count
                score = Score(
                    float(logprob[start:end].sum()), bool(greedy[start:end].all()), chosen
                )
                for owner in owners:
                    scores[owner] = score
    return [score for score in scores if score is not None]  # every request has its row


def _batches(rows: list[_Row], batch_size: int) -> list[tuple[list[_Row], int, int]]:
    """Rows that are read together, their padded length, and the number of rows compiled for."""
    batches, start = [], 0
    while start < len(rows):
        length = bucket(len(rows[start].tokens))
        size = max(1, min(batch_size, ATTENTION_CELLS // length**2))
        batches.append((rows[start : start + size], length, size))
        start += size
    return batches


def _run(repaired: Repaired, batch: list[_Row], length: int, size: int):
    """Log-probabilities (float64) and greediness of a batch's targets, and the rows' choices."""
    ids, mask = np.zeros((2, size, length), np.int32)
    positions, targets = [], []
    for number, row in enumerate(batch):
        ids[number, : len(row.tokens)] = row.tokens
        mask[number, : len(row.tokens)] = row.mask
        positions += [number * length + position for position in row.positions]
        targets += row.targets
    # Rows that fill up the last batch repeat its first.
    ids[len(batch) :], mask[len(batch) :] = ids[0], mask[0]
    count = len(targets)
    spare = max(32, 1 << (count - 1).bit_length()) - count
    index = np.pad(np.asarray(positions, np.int32), (0, spare))
    wanted = np.pad(np.asarray(targets, np.int32), (0, spare))
    hidden, choice = _read(repaired, ids, mask)
    logprob, greedy = gather(_score(repaired, hidden, index, wanted))
    choice = None if choice is None else np.asarray(gather(choice))
    return np.asarray(logprob, np.float64)[:count], np.asarray(greedy)[:count], choice


@jax.jit
def _read(repaired: Repaired, ids: jax.Array, mask: jax.Array):
    """Hidden states [B * T, E] and the pool's choice [B] or None."""
    choice = repaired.choose(ids, mask)
    past = (
        repaired.prefix
        if choice is None or repaired.prefix is None
        else repaired.prefix.rows(choice)
    )
    hidden = repaired.decoder.hidden(ids, mask, past=past)
    return hidden.reshape(-1, hidden.shape[-1]), choice


@jax.jit
def _score(repaired: Repaired, hidden: jax.Array, index: jax.Array, targets: jax.Array):
    """Apart from `_read`: another number of targets does not compile the layers again."""
    return token_scores(repaired.decoder, jnp.take(hidden, index, axis=0), targets)
