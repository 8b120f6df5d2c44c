"""Training windows in a fixed order, without end."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from idp_jax.data.sources import HUB, documents
from idp_jax.data.windows import take_windows, windows


@dataclass(frozen=True)
class TrainingText:
    """Training windows in a fixed order, without end, and the windows held out for validation.

    A local text is kept whole and shuffled anew every epoch; a hub dataset is streamed through a
    shuffle buffer.
    """

    source: str
    tokenizer: Any
    length: int
    validation: np.ndarray
    local: np.ndarray | None
    held_out: int
    seed: int

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
    ) -> "TrainingText":
        """Reads a local text, or starts a stream.

        Args:
            validation: a source of its own, or None to hold out windows of the training text (a
                local text's last, a
                stream's first).

        Raises:
            ValueError: a source is missing, or too short.
        """
        local = None
        if not source.startswith(HUB):
            local = list(windows(documents(source), tokenizer, length))
        held_out = 0
        if validation is not None:
            kept = take_windows(
                documents(validation), tokenizer, length, validation_windows, validation
            )
        elif local is None:
            stream = documents(source, seed=seed, shuffle=True)
            kept = take_windows(stream, tokenizer, length, validation_windows, source)
            held_out = validation_windows
        else:
            if len(local) <= validation_windows:
                raise ValueError(
                    f"{source} gives {len(local)} windows of {length} tokens, too few to train on "
                    "when "
                    f"{validation_windows} are held out for validation; give more text, "
                    "--data.validation, or fewer --data.validation-windows"
                )
            kept, local = np.stack(local[-validation_windows:]), local[:-validation_windows]
        if local is not None and not len(local):
            raise ValueError(
                f"{source} is shorter than one window of {length} tokens; give more text"
            )
        stacked = None if local is None else np.stack(local)
        return cls(source, tokenizer, length, kept, stacked, held_out, seed)

    def batches(self, size: int, skip: int = 0) -> Iterator[np.ndarray]:
        """int32 [size, length] without end, `skip` batches left out (those of a run that goes
        on).
        """
        stream = islice(self._windows(), skip * size, None)
        while True:
            yield np.stack(list(islice(stream, size)))

    def _windows(self) -> Iterator[np.ndarray]:
        epoch = 0
        while True:
            if self.local is not None:
                order = np.random.default_rng([self.seed, epoch]).permutation(len(self.local))
                yield from (self.local[index] for index in order)
            else:
                yield from self._stream()
            epoch += 1

    def _stream(self) -> Iterator[np.ndarray]:
        """One pass over a stream. Every pass has the same order: what is held out stays so."""
        texts = documents(self.source, seed=self.seed, shuffle=True)
        rest = islice(windows(texts, self.tokenizer, self.length), self.held_out, None)
        empty = True
        for window in rest:
            empty = False
            yield window
        if empty:
            raise ValueError(
                f"{self.source} gives no window of {self.length} tokens to train on beside the "
                f"{self.held_out} held out; give more text or fewer --data.validation-windows"
            )
