"""Scoring many (context, continuation) pairs with few rows and few compilations.

Pairs with one context share a row: the context is its trunk, with what their continuations begin
with alike (of sentences that differ in their ends, nearly all), and the rest of every distinct
continuation is a branch behind it, which sees the trunk and itself. A continuation's last token is
predicted but never read, so a one-token answer adds nothing to the row. The invariant: scores are
those of each pair by itself, whatever the batch, the order and the other pairs.

A pool's prompt is chosen from a request's `chooser`, which need not be the whole context: of
options that differ in their context it is what these share.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

import jax
import jax.numpy as jnp
import numpy as np

from idp_jax.evaluation.journal import Journal
from idp_jax.inference.buckets import bucket
from idp_jax.models.likelihood import token_scores
from idp_jax.processes import gather
from idp_jax.recover import Repaired
from idp_jax.sharding import filled_rows

# Beyond this, attention over other branches costs more than reading the context again.
MERGED_TOKENS = 512
ATTENTION_CELLS = 2**22  # rows * T * T at a time: 1/2 GB of float32 scores for 32 heads
_FIRST_BRANCH = 2


@dataclass(frozen=True)
class Request:
    """A continuation to be scored behind a context (both of one token or more).

    Attributes:
        whole: both are one text, and a pool's prompt is chosen from all that is read of it.
        chooser: what a pool's prompt is chosen from, no longer than the context; None is the
            context.
    """

    context: list[int]
    continuation: list[int]
    whole: bool = False
    chooser: list[int] | None = None


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
    """One row: its tokens and mask, the predictions asked of it, and whose answers they are.

    `chooser`: what the pool's prompt is chosen from; None is all that the mask marks 1.
    `shared`: how many predictions, the first ones, are of the trunk and so of every answer.
    """

    tokens: list[int]
    mask: list[int]
    chooser: tuple[int, ...] | None
    positions: list[int]
    targets: list[int]
    shared: int
    answers: list[tuple[list[int], int]] = field(default_factory=list)

    @classmethod
    def begun(cls, context: Sequence[int], shared: Sequence[int], chooser) -> "_Row":
        """A row that holds its trunk alone."""
        trunk = [*context, *shared]
        positions = [*range(len(context) - 1, len(trunk) - 1)]
        return cls(trunk, [1] * len(trunk), chooser, positions, [*shared], len(shared))

    def add(self, rest: Sequence[int], owners: list[int], trunk: int) -> None:
        """A branch: a continuation's tokens behind the trunk, of which there are `trunk`."""
        start = len(self.tokens)
        self.tokens += rest[:-1]
        self.mask += [_FIRST_BRANCH + len(self.answers)] * (len(rest) - 1)
        self.positions += [trunk - 1, *range(start, len(self.tokens))]
        self.targets += rest
        self.answers.append((owners, len(rest)))


def common_prefix(rows: Sequence[list[int]] | Sequence[tuple[int, ...]]) -> list[int]:
    """The tokens that all rows begin with."""
    pairs = zip(min(rows), max(rows), strict=False)  # all others lie between these two
    return [token for token, other in takewhile(lambda pair: pair[0] == pair[1], pairs)]


def plan_rows(requests: Sequence[Request], max_length: int) -> list[_Row]:
    """The rows that answer all requests, none longer than `max_length`.

    Requests must fit alone: len(context) + len(continuation) - 1 <= max_length.
    """
    groups: dict[tuple, dict[tuple, list[int]]] = {}
    for index, request in enumerate(requests):
        # A whole text is a trunk to its end, so it shares its row with nothing.
        alone = index if request.whole else None
        chooser = None if request.whole else tuple(request.chooser or request.context)
        key = (tuple(request.context), chooser, alone)
        groups.setdefault(key, {}).setdefault(tuple(request.continuation), []).append(index)
    rows, longest = [], min(max_length, MERGED_TOKENS)
    for (context, chooser, _), continuations in groups.items():
        for members, shared in _clusters(len(context), sorted(continuations), longest):
            row = _Row.begun(context, members[0][:shared], chooser)
            for member in members:
                row.add(member[shared:], continuations[member], len(context) + shared)
            rows.append(row)
    return rows


def _clusters(
    context: int, ordered: Sequence[tuple], longest: int
) -> Iterator[tuple[list[tuple], int]]:
    """The continuations of each row, and how many of their tokens they begin with alike.

    Neighbours in the order of their tokens have the most in common. One joins the row of those
    before it where that reads fewer tokens than a row of its own, and the row is not too long.

    Args:
        context: tokens before every continuation.
        ordered: sorted and distinct.
    """
    members: list[tuple] = []
    shared = held = 0  # tokens alike (one at least is left to each), and of all members together
    for continuation in ordered:
        alike = len(continuation) - 1
        if members:
            alike = min(shared, alike, len(common_prefix([members[-1], continuation])))
            joined = _size(context, alike, held + len(continuation), len(members) + 1)
            apart = _size(context, shared, held, len(members)) + context + len(continuation) - 1
            if joined > min(longest, apart):
                yield members, shared
                members, held, alike = [], 0, len(continuation) - 1
        members.append(continuation)
        shared, held = alike, held + len(continuation)
    yield members, shared


def _size(context: int, shared: int, held: int, members: int) -> int:
    """Tokens of a row: the trunk, and of every member what is behind it but the last token."""
    return context + shared + held - members * (shared + 1)


def score_requests(
    repaired: Repaired,
    requests: Sequence[Request],
    batch_size: int,
    max_length: int,
    progress: Callable = iter,
    journal: Journal | None = None,
) -> list[Score]:
    """Scores in the order of the requests.

    Args:
        batch_size: rows at a time, fewer where rows are long.
        max_length: tokens of a row at most.
        progress: wraps the list of batches, for a progress bar.
        journal: of batches that are known already.

    Raises:
        ValueError: an id outside the vocabulary.
    """
    rows = sorted(plan_rows(requests, max_length), key=lambda row: -len(row.tokens))
    if rows:
        every_id = np.concatenate([np.asarray(row.tokens + row.targets, np.int32) for row in rows])
        repaired.decoder.check(every_id[:, None])
    journal = journal or Journal()
    scores: list[Score | None] = [None] * len(requests)
    for batch, length, size in progress(_batches(rows, batch_size)):
        found = _answers(repaired, batch, length, size, journal)
        for row, answers in zip(batch, found, strict=True):
            for (owners, _), answer in zip(row.answers, answers, strict=True):
                for owner in owners:
                    scores[owner] = Score(*answer)
    return [score for score in scores if score is not None]  # every request has its row


def _answers(
    repaired: Repaired, batch: list[_Row], length: int, size: int, journal: Journal
) -> list[list[tuple[float, bool, int | None]]]:
    """By row and answer: log-probability, greediness and the row's choice."""
    arrays = _arrays(batch, length, size)

    def compute():
        logprob, greedy, choice = _run(repaired, *arrays)
        prompts = 0 if repaired.prefix is None else repaired.prefix.batch
        found, end = [], 0
        for number, row in enumerate(batch):
            # A choice of none has no number, nor has what is scored behind it.
            chosen = None if choice is None or choice[number] == prompts else int(choice[number])
            found.append([])
            trunk, end = slice(end, end + row.shared), end + row.shared
            for _, count in row.answers:
                own, end = slice(end, end + count), end + count
                total = logprob[trunk].sum() + logprob[own].sum()
                likeliest = greedy[trunk].all() and greedy[own].all()
                found[-1].append((float(total), bool(likeliest), chosen))
        return found

    counts = [[row.shared, *(count for _, count in row.answers)] for row in batch]
    return journal(compute, "scores", *arrays, counts)


def _batches(rows: list[_Row], batch_size: int) -> list[tuple[list[_Row], int, int]]:
    """Rows that are read together, their padded length, and the number of rows compiled for."""
    batches, start = [], 0
    while start < len(rows):
        length = bucket(len(rows[start].tokens))
        size = filled_rows(max(1, min(batch_size, ATTENTION_CELLS // length**2)))
        batches.append((rows[start : start + size], length, size))
        start += size
    return batches


def _arrays(batch: list[_Row], length: int, size: int) -> tuple[np.ndarray, ...]:
    """Ids, mask, the choosers' ids and mask, [size, length]; targets and their places, [count]."""
    ids, mask, chooser_ids, chooser_mask = np.zeros((4, size, length), np.int32)
    positions, targets = [], []
    for number, row in enumerate(batch):
        ids[number, : len(row.tokens)] = row.tokens
        mask[number, : len(row.tokens)] = row.mask
        chooser_ids[number], chooser_mask[number] = ids[number], mask[number]
        if row.chooser is not None:
            chooser_ids[number] = chooser_mask[number] = 0
            chooser_ids[number, : len(row.chooser)] = row.chooser
            chooser_mask[number, : len(row.chooser)] = 1
        positions += [number * length + position for position in row.positions]
        targets += row.targets
    whole = ids, mask, chooser_ids, chooser_mask
    for rows in whole:
        rows[len(batch) :] = rows[0]  # rows that fill up the last batch repeat its first
    return *whole, np.asarray(targets, np.int32), np.asarray(positions, np.int32)


def _run(repaired: Repaired, ids, mask, chooser_ids, chooser_mask, targets, positions):
    """Log-probabilities (float64) and greediness of a batch's targets, and the rows' choices."""
    count = len(targets)
    spare = max(32, 1 << (count - 1).bit_length()) - count
    index, wanted = np.pad(positions, (0, spare)), np.pad(targets, (0, spare))
    hidden, choice = _read(repaired, ids, mask, chooser_ids, chooser_mask)
    logprob, greedy = gather(_score(repaired, hidden, index, wanted))
    choice = None if choice is None else np.asarray(gather(choice))
    return np.asarray(logprob, np.float64)[:count], np.asarray(greedy)[:count], choice


@jax.jit
def _read(repaired: Repaired, ids, mask, chooser_ids, chooser_mask):
    """Hidden states [B * T, E] and the pool's choice [B] or None."""
    choice = repaired.choose(chooser_ids, chooser_mask)
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
