"""Two processes work as one: a job over a network, on one machine."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from idp_jax import load_model
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


def _finish(processes: list[subprocess.Popen], status: int = 0) -> list[str]:
    """Waits for processes that must end with this status; returns what each said of errors."""
    said = []
    try:
        for process in processes:
            _, errors = process.communicate(timeout=300)
            assert process.returncode == status, errors[-2000:]
            said.append(errors)
        return said
    finally:
        for process in processes:  # one that failed leaves the other waiting for it
            process.kill()
            process.communicate()


def _start_together(arguments: list[str]) -> list[subprocess.Popen]:
    """Two processes of one job."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    together = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    arguments = [*arguments, "mesh"]
    return [_start(arguments, {**together, "JAX_PROCESS_ID": str(i)}) for i in range(2)]


def _alone_and_together(command: str, model: Path, text: str, folder: Path) -> list[Path]:
    """What one process makes, and what two that know each other make together."""
    outs = [folder / "one", folder / "two"]
    _finish([_start([command, str(model), text, str(outs[0])], {})])
    _finish(_start_together([command, str(model), text, str(outs[1])]))
    return outs


def test_two_processes_train_like_one(tmp_path):
    model = tmp_path / "model"
    tiny_folder(model, "llama")
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"line {n} of {n * n % 17} words" for n in range(200)))
    outs = _alone_and_together("train", model, str(text), tmp_path)
    one, two = (load_file(out / "adapter/adapter_model.safetensors") for out in outs)
    assert one.keys() == two.keys()
    for name, value in one.items():
        np.testing.assert_allclose(two[name], value, atol=1e-5)
    assert any(np.abs(value).max() > 1e-3 for name, value in one.items() if "lora_B" in name)


@pytest.mark.slow
def test_two_processes_compress_like_one(tmp_path):
    # A vocabulary that the mesh divides: embedding and head are larger than any one process holds.
    model = tiny_folder(tmp_path / "model", "llama", vocab_size=264, num_layers=1)
    outs = _alone_and_together("compress", model, "self", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "one", "two"]
    names = [sorted(path.name for path in out.iterdir()) for out in outs]
    assert names[0] == names[1]
    one, two = (json.loads((out / "compression.json").read_text())["matrices"] for out in outs)
    for alone, together in zip(one, two, strict=True):
        wanted = {key: pytest.approx(alone[key], rel=1e-2) for key in alone if "error" in key}
        assert together == alone | wanted
    for file in outs[0].glob("*.safetensors"):
        here, there = load_file(file), load_file(outs[1] / file.name)
        assert here.keys() == there.keys()
        for name, value in here.items():
            if not name.endswith(("qweight", "scales", "qzeros")):
                np.testing.assert_array_equal(there[name], value)
    models = [load_model(out).layers for out in outs]
    for name in models[0].weight_names:
        # A sum in another order tips single weights over to the next code.
        close = np.isclose(*(getattr(layers, name).dense() for layers in models), atol=1e-3)
        assert close.mean() > 0.99, name


def test_a_process_reads_its_part_and_hears_of_the_others(tmp_path):
    model = tiny_folder(tmp_path / "model", "llama", vocab_size=264)
    said = _finish(_start_together(["load", str(model), "", ""]))
    tensors = load_file(model / "model.safetensors")
    norms = sum(value.nbytes for name, value in tensors.items() if "norm" in name)
    matrices = sum(value.nbytes for value in tensors.values()) - norms
    assert [int(text.split()[-1]) for text in said] == [matrices // 2 + norms] * 2
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][3, -1] = np.nan  # one of the last inputs, which lie on the second process
    save_file(tensors, model / "model.safetensors")
    first, second = _finish(_start_together(["load", str(model), "", ""]), status=1)
    assert f"ValueError: process 1 failed: {name}" in first.splitlines()[-1]
    assert f"CheckpointError: {name}" in second.splitlines()[-1] and "1 of" in second


def test_what_stops_the_first_process_stops_all(tmp_path):
    """Only process 0 looks at the job's folder; the other would wait for it for ever."""
    model = tiny_folder(tmp_path / "model", "llama", vocab_size=264, num_layers=1)
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "letter.txt").write_text("dear")
    processes = _start_together(["compress", str(model), "self", str(tmp_path / "out")])
    first, second = _finish(processes, status=1)
    reason = f"{tmp_path / 'out.partial'} exists and holds no run of this kind; give another --out"
    assert first.rstrip().endswith(f"ConfigError: {reason}")
    assert second.rstrip().endswith(f"ValueError: process 0 failed: {reason}")
    assert (tmp_path / "out.partial" / "letter.txt").read_text() == "dear"
