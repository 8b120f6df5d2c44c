"""Two processes read one batch: each its own rows, and of a stream no more than these."""

import json
from pathlib import Path

import numpy as np

from idp_jax.data.stream import TrainingText
from tests.sharding.processes import finish, start_together

LENGTH, SIZE, BATCHES = 8, 8, 12  # as the worker has them
WORKER = Path(__file__).with_name("input_worker.py")


def test_each_process_reads_its_own_rows():
    said = finish(start_together(devices=2, code=WORKER.read_text()))
    found = [json.loads(errors.splitlines()[-1]) for errors in said]
    assert sorted(found[0]["rows"] + found[1]["rows"]) == list(range(SIZE))
    windows = np.arange(40 * LENGTH, dtype=np.int32).reshape(40, LENGTH)
    batches = TrainingText("", None, LENGTH, windows[:4], windows[4:], 0, 7).batches(SIZE)
    whole = [next(batches).tokens.tolist() for _ in range(BATCHES)]
    assert found[0]["whole"] == found[1]["whole"] == whole
    half = BATCHES * SIZE * LENGTH // 2
    assert all(half <= each["tokens"] <= half + 2 * 22 for each in found)
