"""Held-out text of an experiment or a sweep: documents that choose, and others that are reported.

The invariant: no document that training sees is held out, and none that chooses a learning rate or
a step is reported. Documents are told apart by their words, so a copy elsewhere counts as well.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from idp_jax.config import ConfigError, Corpora
from idp_jax.data.sources import HUB, SELF, documents
from idp_jax.data.text import read_documents
from idp_jax.data.windows import take_windows
from idp_jax.experiments.once import check_unchanged
from idp_jax.jobs.files import write_text
from idp_jax.jobs.marker import MARKER, mark

_SPARE = 2  # windows more than are needed: tokens are counted document by document


def held_out_files(out: Path) -> dict[str, Path]:
    """Where the two parts are; what is reported is cut first."""
    return {part: out / "text" / f"{part}.jsonl" for part in ("reported", "choosing")}


def check_corpora(data: Corpora) -> None:
    """Refuses text that is not there, or cannot be held apart.

    Raises:
        ConfigError: it names the file.
    """
    for name, file in (("held-out", data.held_out), ("second", data.second)):
        if file is not None and not file.is_file():
            raise ConfigError(f"--data.{name} {file} is no file; check the path")
    if data.train == SELF:
        raise ConfigError("--data.train self is no text that others can be held apart from")
    files = {"train": data.train, "held-out": data.held_out, "second": data.second}
    known: dict[Path, str] = {}
    for name, file in files.items():
        if file is not None and not str(file).startswith(HUB):
            other = known.setdefault(Path(file).resolve(), name)
            if other != name:
                raise ConfigError(f"--data.{name} {file} is --data.{other} too; give other text")
    if ".jsonl" not in data.held_out.suffixes:
        raise ConfigError(
            f"--data.held-out {data.held_out} is one document, which cannot both choose and be "
            "reported; give a .jsonl file"
        )


def write_held_out(data: Corpora, tokenizer: Any, out: Path) -> None:
    """Splits the held-out text by documents, without those that training sees.

    Args:
        tokenizer: a transformers tokenizer.
        out: the folder of the experiment or sweep.

    Raises:
        ConfigError: there is too little text, or the second text has documents of the others.
    """
    if is_split(out):
        check_unchanged(out / "text")
        return
    for part, lines in split_held_out(data, tokenizer).items():
        write_text(held_out_files(out)[part], lines)
    mark(out / "text")


def is_split(out: Path) -> bool:
    """Whether the parts are there already."""
    files = held_out_files(out)
    return all(file.is_file() for file in files.values()) and (out / "text" / MARKER).exists()


def check_enough(data: Corpora, tokenizer: Any) -> None:
    """Refuses text that is too short for what it is to do.

    Raises:
        ConfigError: there is too little held-out text, or it is not apart.
        ValueError: there is too little to calibrate with.
    """
    if not data.train.startswith(HUB):
        length, wanted = data.sequence_length, data.calibration_windows
        take_windows(documents(data.train), tokenizer, length, wanted, data.train)
    split_held_out(data, tokenizer)


def split_held_out(data: Corpora, tokenizer: Any) -> dict[str, str]:
    """The lines of both parts; raises as `write_held_out`."""
    seen = set() if data.train.startswith(HUB) else {key for key, _ in _documents(data.train)}
    for key, text in [] if data.second is None else list(_documents(data.second)):
        if key in seen:
            raise ConfigError(
                f"--data.second {data.second} has a document of {data.train} ({text[:40]!r}); "
                "give other text"
            )
        seen.add(key)  # nor may it choose what it is reported on
    fresh = _fresh(data.held_out, seen)
    counts = {"reported": data.reported_windows, "choosing": data.choosing_windows}
    return {
        part: "".join(
            json.dumps({"text": text}) + "\n"
            for text in _take(fresh, data, tokenizer, part, windows)
        )
        for part, windows in counts.items()
    }


def _take(
    fresh: Iterator[str], data: Corpora, tokenizer: Any, part: str, windows: int
) -> Iterator[str]:
    """The next documents, until they fill the windows of a part."""
    wanted, found = (windows + _SPARE) * data.sequence_length, 0
    while found < wanted:
        text = next(fresh, None)
        if text is None:
            raise ConfigError(
                f"--data.held-out {data.held_out} has too few documents that are not in "
                f"{data.train}: {found:,} of {wanted:,} tokens for the {part} windows; give "
                f"more text, or fewer --data.{part}-windows"
            )
        found += len(tokenizer(text)["input_ids"])
        yield text


def _fresh(file: Path, seen: set[bytes]) -> Iterator[str]:
    """The documents of a file that were not seen, each once."""
    known = set(seen)
    for key, text in _documents(file):
        if key not in known:
            known.add(key)
            yield text


def _documents(file: str | Path) -> Iterator[tuple[bytes, str]]:
    """The documents of a .jsonl file with what tells them apart; a .txt file is none."""
    for document in read_documents(file):
        if isinstance(document, str):
            words = " ".join(document.split())
            yield hashlib.sha256(words.encode()).digest(), document
