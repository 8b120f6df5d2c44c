"""Two processes read one batch: each its own rows, and of a stream no more than these."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np

from idp_jax.data.stream import TrainingText

LENGTH, SIZE, BATCHES = 8, 8, 12  # as the worker has them
WORKER = Path(__file__).with_name("input_worker.py")


def test_each_process_reads_its_own_rows():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    together = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    own = {key: value for key, value in os.environ.items() if not key.startswith("XLA_")}
    processes = [
        subprocess.Popen(
            [sys.executable, str(WORKER)],
            env={**own, **together, "JAX_PROCESS_ID": str(number)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    found = []
    try:
        for process in processes:
            said, errors = process.communicate(timeout=200)
            assert process.returncode == 0, errors[-2000:]
            found.append(json.loads(said.splitlines()[-1]))
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert sorted(found[0]["rows"] + found[1]["rows"]) == list(range(SIZE))
    windows = np.arange(40 * LENGTH, dtype=np.int32).reshape(40, LENGTH)
    batches = TrainingText("", None, LENGTH, windows[:4], windows[4:], 0, 7).batches(SIZE)
    whole = [next(batches).tokens.tolist() for _ in range(BATCHES)]
    assert found[0]["whole"] == found[1]["whole"] == whole
    half = BATCHES * SIZE * LENGTH // 2
    assert all(half <= each["tokens"] <= half + 2 * 22 for each in found)
