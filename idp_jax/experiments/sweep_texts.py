"""The held-out text of a sweep: documents that choose, and others that are reported.

The invariant: no document that training sees is held out, and none that chooses a learning rate or
a step is reported. Documents are told apart by their words, so a copy elsewhere counts as well.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from idp_jax.config import ConfigError, Corpora
from idp_jax.data.sources import HUB
from idp_jax.data.text import read_documents
from idp_jax.experiments.once import check_unchanged
from idp_jax.jobs.files import write_text
from idp_jax.jobs.marker import mark

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
    if ".jsonl" not in data.held_out.suffixes:
        raise ConfigError(
            f"--data.held-out {data.held_out} is one document, which cannot both choose and be "
            "reported; give a .jsonl file"
        )


def write_held_out(data: Corpora, tokenizer: Any, out: Path) -> None:
    """Splits the held-out text by documents, without those that training sees.

    Args:
        tokenizer: a transformers tokenizer.
        out: the sweep's folder.

    Raises:
        ConfigError: there is too little text, or the second text has documents of the others.
    """
    files = held_out_files(out)
    if all(file.is_file() for file in files.values()) and (out / "text" / ".idp-jax.json").exists():
        check_unchanged(out / "text")
        return
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
    parts = {
        part: "".join(
            json.dumps({"text": text}) + "\n"
            for text in _take(fresh, data, tokenizer, part, windows)
        )
        for part, windows in counts.items()
    }
    for part, lines in parts.items():
        write_text(files[part], lines)
    mark(out / "text")


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
