"""Two processes train as one: a job over a network, on one machine."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from tests.helpers import tiny_folder

WORKER = Path(__file__).with_name("process_worker.py")


def _start(arguments: list[str], environment: dict[str, str]) -> subprocess.Popen:
    own = {key: value for key, value in os.environ.items() if not key.startswith("XLA_")}
    return subprocess.Popen(
        [sys.executable, str(WORKER), *arguments],
        env={**own, **environment},
        stderr=subprocess.PIPE,
        text=True,
    )


def _finish(processes: list[subprocess.Popen]) -> None:
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-2000:]


def test_two_processes_train_like_one(tmp_path):
    model = tmp_path / "model"
    tiny_folder(model, "llama")
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"line {n} of {n * n % 17} words" for n in range(200)))
    _finish([_start([str(model), str(text), str(tmp_path / "one")], {})])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    together = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    arguments = [str(model), str(text), str(tmp_path / "two"), "mesh"]
    _finish([_start(arguments, {**together, "JAX_PROCESS_ID": str(i)}) for i in range(2)])
    one, two = (
        load_file(tmp_path / run / "adapter/adapter_model.safetensors") for run in ("one", "two")
    )
    assert one.keys() == two.keys()
    for name, value in one.items():
        np.testing.assert_allclose(two[name], value, atol=1e-5)
    assert any(np.abs(value).max() > 1e-3 for name, value in one.items() if "lora_B" in name)
