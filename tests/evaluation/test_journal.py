"""An interrupted evaluation goes on from what it scored, to the same file bit by bit."""

import dataclasses
import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest

from idp_jax.config import Evaluate
from idp_jax.evaluation import read
from idp_jax.evaluation import requests as scoring
from idp_jax.evaluation.job import score
from idp_jax.evaluation.journal import Journal
from idp_jax.jobs.progress import Progress
from tests.evaluation.test_task_data import write_rows
from tests.helpers import tiny_folder


class Stopped(Exception):
    """What a signal raises between two batches."""


class StopAfter(Progress):
    """Stops at the given update of the bars of scoring, all together."""

    def __init__(self, updates: int):
        self.left = updates

    def track(self, items, description):
        for item in items:
            yield item
            self.left -= description != "loading"
            if self.left < 0:
                raise Stopped


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """Perplexity, answers and generated text of a few items, two at a time."""
    folder = tmp_path_factory.mktemp("files")
    tiny_folder(folder / "model", max_positions=1024)
    words = np.random.default_rng(0).choice(["tide ", "ship ", "lamp ", "storm. "], 200)
    (folder / "text.txt").write_text("".join(words))
    write_rows(folder / "data" / "arc_easy" / "test.jsonl", 6)
    question = {"question": "Who", "answer": {"aliases": ["Nobody"], "value": "Nobody"}}
    write_rows(folder / "data" / "triviaqa" / "validation.jsonl", 1, question)
    return Evaluate(
        model=str(folder / "model"),
        out=folder / "whole.json",
        tasks="arc_easy,triviaqa",
        task_data=folder / "data",
        perplexity=folder / "text.txt",
        sequence_length=32,
        windows=4,
        batch_size=2,
    )


def test_an_interrupted_evaluation_goes_on(asked, tmp_path, monkeypatch):
    whole = score(asked).variants
    again = dataclasses.replace(asked, overwrite=True, out=tmp_path / "r.json")
    kept = tmp_path / "r.json.scored.jsonl"
    lines = 0
    for updates in (0, 1, 3):
        with pytest.raises(Stopped):
            score(again, progress=StopAfter(updates))
        assert len(kept.read_text().splitlines()) > lines and not again.out.exists()
        lines = len(kept.read_text().splitlines())
        with kept.open("a") as file:
            file.write('["half a li')  # a kill in the middle of a write
    reads, read_rows = [], scoring._read
    monkeypatch.setattr(scoring, "_read", lambda *args: reads.append(args) or read_rows(*args))
    assert score(again).variants == whole == read(again.out).variants
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]
    resumed = len(reads)
    score(again)
    assert len(reads) - resumed > resumed  # nothing is left to go on from


def test_another_model_or_text_takes_nothing_over(asked, tmp_path):
    again = dataclasses.replace(asked, overwrite=True, out=tmp_path / "r.json", tasks="")
    with pytest.raises(Stopped):
        score(again, progress=StopAfter(1))
    other = tiny_folder(tmp_path / "other", seed=1, max_positions=1024)
    other = dataclasses.replace(again, model=str(other))
    found = score(other).variants[0].perplexity
    fresh = dataclasses.replace(other, out=tmp_path / "fresh.json")
    assert found == score(fresh).variants[0].perplexity
    assert found.per_window_nll != score(again).variants[0].perplexity.per_window_nll


def test_what_went_in_is_known_by_all_its_parts(tmp_path):
    file, calls = tmp_path / "kept.jsonl", []

    def value(*parts, identity="a"):
        return Journal(file).within(identity)(lambda: calls.append(1) or len(calls), *parts)

    ids = np.arange(6, dtype=np.int32)
    first = value("kind", ids, [1, 2])
    assert value("kind", ids, [1, 2]) == first == 1
    others = [("kind", ids[::-1], [1, 2]), ("kind", ids.reshape(2, 3), [1, 2])]
    others += [("kind", ids.astype(np.int64), [1, 2]), ("kind", ids, [1]), ("sort", ids, [1, 2])]
    assert [value(*parts) for parts in others] == [2, 3, 4, 5, 6]
    assert value("kind", ids, [1, 2], identity="b") == 7
    assert [json.loads(line)[1] for line in file.read_text().splitlines()] == [*range(1, 8)]


def test_numbers_come_back_as_they_were(tmp_path):
    numbers = [0.1 + 0.2, 1e-320, -1.5e300, float("-inf")]
    Journal(tmp_path / "kept")(lambda: numbers, 1)
    assert Journal(tmp_path / "kept")(pytest.fail, 1) == numbers


@pytest.mark.parametrize("line", ["5", "null", "[[], 1]", "[1]", "{}", "[" * 10**5, "\xff"])
def test_a_line_that_is_none_of_ours_ends_what_is_known(tmp_path, line):
    file = tmp_path / "kept"
    Journal(file)(lambda: 1, "a")
    kept = file.read_bytes()
    file.write_bytes(kept + line.encode("latin-1") + b"\n" + kept)
    journal = Journal(file)
    assert journal(pytest.fail, "a") == 1 and file.read_bytes() == kept


def test_a_disk_that_takes_nothing_keeps_no_empty_file(tmp_path, monkeypatch):
    """Nor does it lose what was kept before it was full."""
    journal = Journal(tmp_path / "kept")
    monkeypatch.setattr(Path, "open", lambda path, *how, **more: Full(open(path, *how)))
    with pytest.raises(OSError, match="No space left"):
        journal(lambda: 1, "a")
    assert not list(tmp_path.iterdir())
    with open(tmp_path / "kept", "w") as file:
        file.write("[]\n")
    with pytest.raises(OSError, match="No space left"):
        journal(lambda: 1, "b")
    assert (tmp_path / "kept").stat().st_size == 3


class Full:
    """A file that takes nothing."""

    def __init__(self, file):
        self.file = file

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def write(self, text):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
