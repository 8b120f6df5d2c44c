"""Two processes of four devices each work as one: a job over a network, on one machine."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from idp_jax import load_model
from idp_jax.evaluation import read
from idp_jax.formats import save_adapter
from idp_jax.jobs.files import contents
from tests.helpers import check_same_scores, tiny_folder, tiny_pool
from tests.sharding.processes import finish, start, start_together

# A model on all devices; prints the bytes of its matrices that this process read.
_LOAD = """
import sys
from idp_jax.config import Mesh
from idp_jax.formats import later, load_model
from idp_jax.processes import mesh_of

read, fill = [0], later._fill

def counted(layer, indices, buffers):
    fill(layer, indices, buffers)
    read[0] += sum(buffer.nbytes for buffer in buffers)

later._fill = counted
load_model(sys.argv[1], mesh=mesh_of(Mesh(fsdp=-1)))
print(read[0], file=sys.stderr)
"""
MESH = ("--mesh.data", 4, "--mesh.fsdp", 2)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model, what it might have been made of, and a text."""
    folder = tmp_path_factory.mktemp("files")
    for seed, name in enumerate(("model", "teacher")):
        tiny_folder(folder / name, "llama", seed=seed, num_layers=1, max_positions=512)
    lines = (f"line {n} of {n * n % 17} words" for n in range(200))
    (folder / "text.txt").write_text(" ".join(lines))
    return folder


def training(files, out, *options):
    """Five steps of a LoRA beside a teacher."""
    call = ["train", "--model", files / "model", "--out", out, "--method", "lora"]
    call += ["--batch-size", 8, "--tokens", 5 * 8 * 16, "--data.sequence-length", 16]
    call += ["--data.validation-windows", 4, "--evaluate-every", 2, "--objective", "kl"]
    call += ["--teacher.model", files / "teacher", "--optimizer.learning-rate", 1e-3]
    return [*call, *options]


def check_alike(one, two):
    """The adapters of two runs, which are no start."""
    here, there = (load_file(out / "last/adapter_model.safetensors") for out in (one, two))
    assert here.keys() == there.keys()
    for name, value in here.items():
        np.testing.assert_allclose(there[name], value, atol=1e-5)
    assert any(np.abs(value).max() > 1e-4 for name, value in here.items() if "lora_B" in name)


def test_on_text_of_their_own_two_processes_train_like_one(files, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    text = ("--data.train", "self", "--data.validation", files / "text.txt")
    finish([start(*training(files, one, *text))])
    finish(start_together(*training(files, two, *text, *MESH)))
    texts = [(out / "self_text.jsonl").read_bytes() for out in (one, two)]
    assert texts[0] == texts[1]
    check_alike(one, two)


@pytest.mark.slow
def test_the_word_that_two_processes_keep_serves_one(files, tmp_path):
    one, two, cache = tmp_path / "one", tmp_path / "two", tmp_path / "cache"
    options = ("--data.train", files / "text.txt", "--teacher.cache", cache)
    finish(start_together(*training(files, two, *options, *MESH)))
    before = contents(cache)
    finish([start(*training(files, one, *options))])
    assert contents(cache) == before
    check_alike(one, two)


def test_two_processes_score_like_one(files, tmp_path):
    """Also where batches do not divide over the mesh; process 0 alone writes and speaks."""
    model = load_model(files / "model")
    save_adapter(tiny_pool(model, 3, 5), tmp_path / "pool", decoder=model)
    call = ["eval", "--model", files / "model", "--adapter", tmp_path / "pool", "--batch-size", 3]
    call += ["--perplexity", files / "text.txt", "--sequence-length", 16, "--windows", 5]
    call += ["--tasks", "knowledge_arts", "--limit", 2, "--max-length", 128]
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    finish([start(*call, "--out", one)])
    said = finish(start_together(*call, "--out", two, *MESH))
    assert [str(two) in errors for errors in said] == [True, False]
    alone, together = (read(out).variants[0] for out in (one, two))
    losses = [found.perplexity.per_window_nll for found in (alone, together)]
    np.testing.assert_allclose(*losses, atol=1e-5)
    assert together.perplexity.perplexity == pytest.approx(alone.perplexity.perplexity, rel=1e-5)
    check_same_scores(together.tasks["knowledge_arts"], alone.tasks["knowledge_arts"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.json", "pool", "two.json"]


@pytest.mark.slow
def test_two_processes_compress_like_one(tmp_path):
    # A vocabulary that the mesh divides: embedding and head are larger than any one process holds.
    model = tiny_folder(tmp_path / "model", "llama", vocab_size=264, num_layers=1)
    outs = [tmp_path / "one", tmp_path / "two"]
    call = ["compress", model, "--calibration", "self", "--group-size", 32, "--samples", 8]
    call += ["--sequence-length", 32]
    mesh = ("--mesh.data", 4, "--mesh.model", 2)
    finish([start(*call, "--out", outs[0])])
    finish(start_together(*call, "--out", outs[1], *mesh))
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
    said = finish(start_together(model, code=_LOAD))
    tensors = load_file(model / "model.safetensors")
    norms = sum(value.nbytes for name, value in tensors.items() if "norm" in name)
    matrices = sum(value.nbytes for value in tensors.values()) - norms
    assert [int(text.split()[-1]) for text in said] == [matrices // 2 + norms] * 2
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][3, -1] = np.nan  # one of the last inputs, which lie on the second process
    save_file(tensors, model / "model.safetensors")
    first, second = finish(start_together(model, code=_LOAD), status=1)
    assert f"ValueError: process 1 failed: {name}" in first.splitlines()[-1]
    assert f"CheckpointError: {name}" in second.splitlines()[-1] and "1 of" in second


def test_what_stops_the_first_process_stops_all(tmp_path):
    """Only process 0 looks at the job's folder; the other would wait for it for ever."""
    model = tiny_folder(tmp_path / "model", "llama", vocab_size=264, num_layers=1)
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "letter.txt").write_text("dear")
    call = ["compress", model, "--calibration", "self", "--out", tmp_path / "out"]
    call += ["--group-size", 32, "--sequence-length", 32]
    processes = start_together(*call, "--mesh.data", 4, "--mesh.model", 2)
    first, second = finish(processes, status=2)
    reason = f"{tmp_path / 'out.partial'} exists and holds no run of this kind; give another --out"
    assert first.endswith(f"idp-jax: {reason}\n")
    assert second.endswith(f"idp-jax: process 0 failed: {reason}\n")
    assert (tmp_path / "out.partial" / "letter.txt").read_text() == "dear"
