"""Training windows in a fixed order, without end, and batches of them that know where they are.

Of several processes each makes only its own rows of a batch. Those of a local text are numbered, so
they are the same whatever the number of processes. A stream is dealt out: of S parts each takes
every S-th document and fills its own rows. S is the number of processes that began the run and
belongs to its state, so that another number of them goes on in the same order.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from idp_jax.data.batch import Batch
from idp_jax.data.sources import HUB, documents
from idp_jax.data.windows import keep_windows, take_windows, windows


@dataclass(frozen=True)
class TrainingText:
    """Training windows in a fixed order, without end, and the windows held out for validation.

    A local text is kept whole, in a file, and shuffled anew every epoch; a hub dataset is streamed
    through a shuffle buffer.

    Attributes:
        validation, local: int32 [W, length]; `local` is None for a stream.
        validation_segments, local_segments: the document of each of their tokens where documents
            are kept apart, else None.
        order: which of the orders of a local text's windows that follow from the seed.
        chosen: int [W], numbers of the local windows that are trained on; None for all.
        held_documents: documents of a stream that hold what is held out.
    """

    source: str
    tokenizer: Any
    length: int
    validation: np.ndarray
    local: np.ndarray | None
    held_out: int
    seed: int
    validation_segments: np.ndarray | None = None
    local_segments: np.ndarray | None = None
    order: int = 0
    chosen: np.ndarray | None = None
    held_documents: int = 0

    @classmethod
    def open(
        cls,
        source: str,
        tokenizer: Any,
        length: int,
        *,
        validation: str | None,
        validation_windows: int,
        seed: int,
        folder: Path | None = None,
        apart: bool = False,
    ) -> "TrainingText":
        """Reads a local text, or starts a stream.

        Args:
            apart: keep documents apart instead of joining them, see `data.windows`.
            folder: where the tokens of a local text are kept; None for the system's folder of
                temporary files.
            validation: a source of its own, or None to hold out windows of the training text (a
                local text's last, a stream's first).

        Raises:
            ValueError: a source is missing, or too short.
        """
        local = None
        if not source.startswith(HUB):
            found = windows(documents(source), tokenizer, length, apart=apart)
            local = keep_windows(found, length, folder, apart=apart)
        held_out = held_documents = 0
        if validation is not None:
            texts = documents(validation)
            kept = take_windows(
                texts, tokenizer, length, validation_windows, validation, apart=apart
            )
        elif local is None:
            stream = enumerate(documents(source, seed=seed, shuffle=True), 1)
            texts, numbers = _unzipped(stream)
            kept = take_windows(texts, tokenizer, length, validation_windows, source, apart=apart)
            held_out, held_documents = validation_windows, max(numbers)
        else:
            local, kept = _without_last(local, validation_windows, source)
        if local is not None and not len(local):
            raise ValueError(
                f"{source} is shorter than one window of {length} tokens; give more text"
            )
        kept = np.array(kept)
        part = lambda rows, number: None if rows is None else rows[:, number]
        return cls(
            *(source, tokenizer, length, kept[:, 0] if apart else kept),
            *(part(local, 0) if apart else local, held_out, seed),
            validation_segments=kept[:, 1] if apart else None,
            local_segments=part(local, 1) if apart else None,
            held_documents=held_documents,
        )

    def batches(self, size: int, rows: np.ndarray | None = None) -> "Batches":
        """Training batches of `size` windows, without end.

        Args:
            rows: int [R], numbers of the rows that are made, which divide `size`; None for all.
        """
        return Batches(self, size, rows)

    def validation_batches(self, size: int, parts: int = 1) -> list[Batch]:
        """The held-out windows in equal batches of at most `size`.

        Args:
            parts: that every batch is to divide into; `size` does. Where the windows do not, the
                last batch is filled up with some that do not count.
        """
        length, missing = self.length, -len(self.validation) % parts
        rows = validation_rows(len(self.validation), size, parts)

        def batched(windows: np.ndarray) -> np.ndarray:
            filled = np.concatenate([windows, np.repeat(windows[:1], missing, 0)])
            return filled.reshape(-1, rows, length)

        tokens, segments, counts = batched(self.validation), None, None
        if self.validation_segments is not None:
            segments = batched(self.validation_segments)
        if missing:
            counts = np.arange(tokens[..., 0].size) < len(self.validation)
            counts = np.broadcast_to(counts.reshape(-1, rows, 1), tokens.shape)
        at = lambda arrays, n: None if arrays is None else arrays[n]
        return [Batch(rows, at(segments, n), at(counts, n)) for n, rows in enumerate(tokens)]

    @property
    def apart(self) -> bool:
        """Whether documents are kept apart."""
        return self.validation_segments is not None

    def windows(self, start: int = 0) -> Iterator[np.ndarray]:
        """Training windows from number `start` on, without end; as of `data.windows.windows`."""
        if self.local is None:
            yield from self.streamed(start)
            return
        epoch, place = divmod(start, self.windows_of_an_epoch)
        while True:
            yield from map(self.local_window, self.epoch(epoch)[place:])
            epoch, place = epoch + 1, 0

    @property
    def windows_of_an_epoch(self) -> int:
        """Of a local text, how many are trained on."""
        assert self.local is not None
        return len(self.local) if self.chosen is None else len(self.chosen)

    def epoch(self, number: int) -> np.ndarray:
        """The indices of a local text's windows in the order of an epoch, int [W]."""
        seeds = [self.seed, number, *([self.order] if self.order else [])]
        order = np.random.default_rng(seeds).permutation(self.windows_of_an_epoch)
        return order if self.chosen is None else self.chosen[order]

    def local_window(self, index: int) -> np.ndarray:
        """One window of a local text; as of `data.windows.windows`."""
        assert self.local is not None
        tokens = self.local[index]
        if self.local_segments is None:
            return tokens
        return np.stack([tokens, self.local_segments[index]])

    def first(self, count: int) -> Batch:
        """The first training windows: `count`, or all of a local text where it has fewer."""
        count = count if self.local is None else min(count, len(self.local))
        return self.batch(list(islice(self.windows(), count)))

    def batch(self, windows: list[np.ndarray]) -> Batch:
        """Windows as a batch."""
        rows = np.stack(windows)
        return Batch(rows[:, 0], rows[:, 1]) if self.apart else Batch(rows)

    def streamed(self, start: int, part: int = 0, parts: int = 1) -> Iterator[np.ndarray]:
        """A stream's windows, or those of one of some parts, from number `start` on, without end.

        Raises:
            ValueError: there is none beside what is held out.
        """
        yield from islice(self._passes(part, parts), start, None)

    def _passes(self, part: int, parts: int) -> Iterator[np.ndarray]:
        """Pass after pass over a stream, all in the same order: what is held out stays so."""
        while True:
            texts = documents(self.source, seed=self.seed, shuffle=True)
            held_out = self.held_out
            if parts > 1:  # a part has no windows of the whole
                texts, held_out = islice(texts, self.held_documents + part, None, parts), 0
            found = windows(texts, self.tokenizer, self.length, apart=self.apart)
            empty = True
            for window in islice(found, held_out, None):
                empty = False
                yield window
            if empty:
                raise ValueError(
                    f"{self.source} gives no window of {self.length} tokens to train on beside the "
                    f"{self.held_out} held out; give more text or fewer --data.validation-windows"
                )


def _without_last(windows: np.ndarray, count: int, source: str) -> tuple[np.ndarray, np.ndarray]:
    """All windows but the last, and these, which are held out; ValueError where none is left."""
    if len(windows) <= count:
        raise ValueError(
            f"{source} gives {len(windows)} windows of {windows.shape[-1]} tokens, too few to "
            f"train on when {count} are held out for validation; give more text, "
            "--data.validation, or fewer --data.validation-windows"
        )
    return windows[:-count], windows[-count:]


def _unzipped(numbered: Iterator[tuple[int, Any]]) -> tuple[Iterator[Any], list[int]]:
    """The second of each pair, and a list that holds the first of the last pair that was taken."""
    last = [0]

    def taken() -> Iterator[Any]:
        for last[0], each in numbered:
            yield each

    return taken(), last


def validation_rows(windows: int, size: int, parts: int) -> int:
    """The windows of each of the equal batches that `validation_batches` makes."""
    units = -(-windows // parts)
    return parts * max(n for n in range(1, size // parts + 1) if units % n == 0)


class Batches:
    """Training batches without end that can go on where an earlier run stopped.

    The state counts windows, not batches: a run that goes on with batches of another size meets the
    same windows in the same order. Going on costs the same at any place of a local text, whose
    order follows from the seed and the epoch; a hub dataset is read again up to there, because the
    buffer that it is shuffled through has no state of its own.
    """

    def __init__(self, text: TrainingText, size: int, rows: np.ndarray | None = None):
        self._text, self._size = text, size
        self._rows = np.arange(size) if rows is None else rows
        parts = 1 if text.local is not None else size // len(self._rows)
        self._order: tuple[int, np.ndarray] | None = None
        self.restore({"windows": 0, "parts": parts})

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Batch:
        """The next batch, tokens (and segments) int32 [rows, length]."""
        local = self._text.local is not None
        found = [self._local(int(row)) for row in self._rows] if local else self._streamed()
        self._taken += self._size
        return self._text.batch(found)

    def _local(self, row: int) -> np.ndarray:
        epoch, place = divmod(self._taken + row, self._text.windows_of_an_epoch)
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, self._text.epoch(epoch)
        return self._text.local_window(self._order[1][place])

    def _streamed(self) -> list[np.ndarray]:
        each, found = self._size // self._parts, {}
        for part, stream in self._windows.items():
            found |= enumerate(islice(stream, each), part * each)
        return [found[int(row)] for row in self._rows]

    def state(self) -> dict[str, int]:
        """Where the next batch begins, as plain JSON."""
        parts = {"parts": self._parts} if self._parts > 1 else {}
        return {"windows": self._taken, **parts}

    def restore(self, state: dict[str, int]) -> None:
        """Goes to the place of a `state`.

        Raises:
            ValueError: the run's parts do not divide this batch.
        """
        self._taken, self._parts = state["windows"], state.get("parts", 1)
        if self._size % self._parts:
            raise ValueError(
                f"a batch of {self._size} windows does not divide into the {self._parts} parts "
                "that this run began with, one for each process; choose a multiple of it"
            )
        each, self._windows = self._size // self._parts, {}
        if self._text.local is None:
            for part in sorted({int(row) // each for row in self._rows}):
                start = self._taken // self._parts
                self._windows[part] = self._text.streamed(start, part, self._parts)
