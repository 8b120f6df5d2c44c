"""Batches made ready ahead are the same ones, with the same places, and each part reads its own."""

import threading
import time
from itertools import count, islice

import numpy as np
import pytest

from idp_jax.data import stream, windows
from idp_jax.data.ahead import Ahead
from idp_jax.data.stream import TrainingText

LENGTH, SIZE = 8, 8


class Counting:
    """A tokenizer of one id per character that counts them."""

    def __init__(self):
        self.tokens = 0

    def __call__(self, text, verbose=True):
        self.tokens += len(text)
        return {"input_ids": [ord(character) for character in text]}


def letters(seed: int):
    """Documents, each of one letter of its own and a length drawn by a seed."""
    rng = np.random.default_rng(seed)
    return (chr(1000 + number) * int(rng.integers(1, 40)) for number in count())


@pytest.fixture
def opened(monkeypatch):
    """Opens a stream without end, that is tokenised four documents at a time."""
    monkeypatch.setattr(windows, "_DOCUMENTS_AT_A_TIME", 4)
    monkeypatch.setattr(stream, "documents", lambda source, seed, shuffle: letters(seed))

    def open_stream(**rest) -> TrainingText:
        options = {"validation": None, "validation_windows": 5, "seed": 3} | rest
        return TrainingText.open("hub:some", Counting(), LENGTH, **options)

    return open_stream


def local() -> TrainingText:
    found = np.arange(40 * LENGTH, dtype=np.int32).reshape(40, LENGTH)
    return TrainingText("", None, LENGTH, found[:4], found[4:], 0, 7)


def taken(batches, number: int) -> list:
    return [batch.tokens.tolist() for batch in islice(batches, number)]


def rows_of(process: int, processes: int) -> np.ndarray:
    each = SIZE // processes
    return np.arange(process * each, (process + 1) * each)


@pytest.mark.parametrize("kind", ["local", "stream"])
def test_what_is_made_ready_is_the_same(opened, kind):
    text = local() if kind == "local" else opened()
    plain, ahead = text.batches(SIZE), Ahead(text.batches(SIZE))
    for _ in range(12):
        assert ahead.state() == plain.state()
        assert (next(ahead).tokens == next(plain).tokens).all()
    place = ahead.state()
    rest = taken(ahead, 4)
    ahead.restore(place)
    assert taken(ahead, 4) == rest == taken(plain, 4)
    ahead.close()
    assert not any("grain" in thread.name for thread in threading.enumerate())


def test_batches_are_ready_before_they_are_asked_for():
    batches, made = local().batches(SIZE), threading.Semaphore(0)

    class Watched:
        def __next__(self):
            made.release()
            return next(batches)

        state, restore = batches.state, batches.restore

    ahead = Ahead(Watched())
    next(ahead)
    for _ in range(3):  # the one that was taken, and two that wait
        assert made.acquire(timeout=30)
    ahead.close()


def test_what_goes_wrong_is_told_at_its_batch(opened, monkeypatch):
    text = opened(validation=None)
    monkeypatch.setattr(stream, "documents", lambda *rest, **options: iter([]))
    ahead = Ahead(text.batches(SIZE))
    time.sleep(0.1)
    with pytest.raises(ValueError, match="hub:some gives no window"):
        next(ahead)
    ahead.close()


@pytest.mark.parametrize("processes", [2, 4])
def test_each_process_tokenises_its_share(opened, processes):
    tokens, batches = [], 30
    for process in range(processes):
        text = opened()
        text.tokenizer.tokens = 0
        taken(text.batches(SIZE, rows_of(process, processes)), batches)
        tokens.append(text.tokenizer.tokens)
    share = batches * SIZE * LENGTH // processes
    ahead = 2 * 4 * 40 + LENGTH  # what a group of documents may give beyond the last window
    assert all(share <= each <= share + ahead for each in tokens)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_another_number_of_processes_goes_on_in_the_same_order(opened, processes):
    """The run was begun by two."""
    begun = [opened().batches(SIZE, rows_of(process, 2)) for process in range(2)]
    whole = list(zip(*(taken(batches, 9) for batches in begun), strict=True))
    whole = [first + second for first, second in whole]
    first = opened().batches(SIZE, rows_of(0, 2))
    taken(first, 4)
    found = []
    for process in range(processes):
        batches = opened().batches(SIZE, rows_of(process, processes))
        batches.restore(first.state())
        found.append(taken(batches, 5))
    assert np.concatenate(found, 1).tolist() == whole[4:]


def test_parts_share_no_document_and_none_with_what_is_held_out(opened):
    seen = [set(opened().validation.ravel().tolist())]
    for process in range(2):
        batches = opened().batches(SIZE, rows_of(process, 2))
        seen.append(set(np.ravel(taken(batches, 20)).tolist()))
    blank = {ord("\n")}
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert seen[first] & seen[second] <= blank


def test_local_rows_do_not_depend_on_the_processes():
    whole = taken(local().batches(SIZE), 12)
    parts = [taken(local().batches(SIZE, rows_of(process, 4)), 12) for process in range(4)]
    assert np.concatenate(parts, 1).tolist() == whole


def test_a_batch_that_the_parts_do_not_divide(opened):
    with pytest.raises(ValueError, match="a batch of 8 windows does not divide into the 3 parts"):
        opened().batches(SIZE).restore({"windows": 24, "parts": 3})
