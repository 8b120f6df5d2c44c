"""Windows of tokens for calibration and training, from the model itself, local files or the Hugging
Face hub.

Documents are joined by blank lines and cut into windows without gaps, so every position is real
text. The same source, seed and tokenizer
always give the same windows in the same order.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import jax
import numpy as np

from idp_jax.evaluation.generation import generate
from idp_jax.models import Decoder
from idp_jax.text import join_documents, read_documents

SELF = "self"
HUB = "hub:"
_DOCUMENTS_AT_A_TIME = 256
_SHUFFLE_BUFFER = 10_000
_ROWS = 128  # documents that the model writes at a time
_TOP_K = 50


def documents(source: str, *, seed: int = 0, shuffle: bool = False) -> Iterator[str]:
    """One pass over the documents of a source.

    Args:
        source: a .txt or .jsonl file (or its .gz), or hub:NAME[:CONFIG] (streamed, split
            "train", field `text`).
        shuffle: draw the documents by the seed instead of in their own order.

    Raises:
        ValueError: the source is missing or holds no text.
    """
    if source.startswith(HUB):
        yield from _hub_documents(source, seed, shuffle)
        return
    texts = read_documents(source)
    order = np.random.default_rng(seed).permutation(len(texts)) if shuffle else range(len(texts))
    for index in order:
        yield texts[index]


def _hub_documents(source: str, seed: int, shuffle: bool) -> Iterator[str]:
    from datasets import load_dataset

    name, _, config = source.removeprefix(HUB).partition(":")
    try:
        stream = load_dataset(name, config or None, split="train", streaming=True)
        if shuffle:
            stream = stream.shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER)
        for row in stream:
            yield row["text"]
    except KeyError as error:
        raise ValueError(
            f"dataset {name} has no field {error}; give one with a field 'text'"
        ) from error
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise ValueError(
            f"dataset {name} cannot be read from the hub ({reason}); check the name, or give a "
            "local .jsonl file"
        ) from error


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


def sample_documents(
    model: Decoder,
    tokenizer: Any,
    tokens: int,
    *,
    document_tokens: int = 128,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[str]:
    """Text that the model writes itself, so that no dataset is needed.

    Every document starts from a random token of the vocabulary and is sampled at temperature 1
    among the 50 likeliest, after "LLM-QAT: Data-Free Quantization Aware Training for Large Language
    Models".

    Args:
        tokens: how many to write, at least.
        document_tokens: length of a document at most; short ones are written faster.
        progress: called with tokens written and wanted.
    """
    config = model.config
    special = set(tokenizer.all_special_ids)
    starts = np.array([i for i in range(config.vocab_size) if i not in special], np.int32)
    rng = np.random.default_rng(seed)
    key = jax.random.key(seed)
    length = min(document_tokens, config.max_positions) - 1
    texts, written, rounds = [], 0, 0
    while written < tokens:
        first = rng.choice(starts, (_ROWS, 1))
        rows = generate(
            model,
            first,
            max_new_tokens=length,
            stop_ids=config.eos_token_ids,
            temperature=1.0,
            top_k=_TOP_K,
            key=jax.random.fold_in(key, rounds),
        )
        for row in np.concatenate([first, np.asarray(rows)], 1).tolist():
            ends = [row.index(stop) for stop in config.eos_token_ids if stop in row]
            row = row[: min(ends, default=len(row))]
            written += len(row)
            texts.append(tokenizer.decode(row, skip_special_tokens=True))
        rounds += 1
        progress(min(written, tokens), tokens)
    return texts


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
