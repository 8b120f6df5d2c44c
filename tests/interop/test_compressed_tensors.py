"""pack-quantized folders exchanged with compressed-tensors, which transformers loads them by."""

import importlib.util

import numpy as np
import pytest

from idp_jax import load_model, save_model
from tests.helpers import needs_smollm2
from tests.interop import compressed_tensors_side, ours

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("torch") is None
        or importlib.util.find_spec("compressed_tensors") is None,
        reason="compressed-tensors is missing: make interop runs this where it is installed",
    ),
    pytest.mark.filterwarnings("default"),  # the libraries' own
]

WRITTEN_THERE = {
    "3bit-group32": {"num_bits": 3, "group_size": 32, "symmetric": False},
    "4bit-group32": {"num_bits": 4, "group_size": 32, "symmetric": False},
    "3bit-group64-symmetric": {"num_bits": 3, "group_size": 64, "symmetric": True},
    "4bit-group64-symmetric": {"num_bits": 4, "group_size": 64, "symmetric": True},
    "3bit-rows": {"num_bits": 3, "group_size": -1, "symmetric": False},
    "4bit-rows-symmetric": {"num_bits": 4, "group_size": -1, "symmetric": True},
}
WRITTEN_HERE = {
    "3bit-group32": {"bits": 3, "group_size": 32, "symmetric": False},
    "4bit-group32": {"bits": 4, "group_size": 32, "symmetric": False},
    "3bit-group64-symmetric": {"bits": 3, "group_size": 64, "symmetric": True},
    "4bit-group64-symmetric": {"bits": 4, "group_size": 64, "symmetric": True},
    "3bit-rows": {"bits": 3, "group_size": -1, "symmetric": False},
    "4bit-rows-symmetric": {"bits": 4, "group_size": -1, "symmetric": True},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return ours.tiny_source(tmp_path_factory.mktemp("source") / "model")


def packed_there(source, out, *, dtype: str = "float32", group_size: int, **settings):
    from transformers import AutoModelForCausalLM

    strategy = {"strategy": "channel"}
    if group_size > 0:
        strategy = {"strategy": "group", "group_size": group_size}
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    return compressed_tensors_side.pack(model, out, **strategy, **settings)


def check_same(folder, tolerance: float = ours.TOLERANCE) -> None:
    ours.check_same(folder, compressed_tensors_side.Loaded(folder), tolerance)


@pytest.mark.parametrize("case", WRITTEN_THERE)
def test_written_there_read_here(source, tmp_path, case):
    check_same(packed_there(source, tmp_path / "packed", **WRITTEN_THERE[case]))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(source, tmp_path, dtype):
    """The library multiplies in the scales' own precision, and so do we in the file's."""
    settings = {"num_bits": 4, "group_size": 32, "symmetric": False, "dtype": dtype}
    folder = packed_there(source, tmp_path / "packed", **settings)
    model = load_model(folder, weights="dense", dtype="auto")
    assert ours.differing(model, compressed_tensors_side.Loaded(folder).weights()) == []


@pytest.mark.parametrize("case", WRITTEN_HERE)
def test_written_here_read_there(source, tmp_path, case):
    check_same(
        ours.rounded(source, tmp_path / "packed", **WRITTEN_HERE[case], form="pack-quantized")
    )


@pytest.mark.parametrize("bits", [3, 4])
def test_loaded_packed_there(source, tmp_path, bits):
    settings = {"bits": bits, "group_size": 32, "symmetric": True, "form": "pack-quantized"}
    folder = ours.rounded(source, tmp_path / "packed", **settings)
    theirs, model = compressed_tensors_side.Loaded(folder, dequantize=False), load_model(folder)
    ids = ours.ids_for(model)
    expected = ours.torch_logits(theirs.model, ids)
    assert np.abs(np.asarray(model(ids)) - expected).max() <= ours.TOLERANCE


@pytest.mark.parametrize("bits", [3, 4])
def test_every_zero_point_survives(tmp_path, bits):
    check_same(ours.random_codes(tmp_path / "packed", bits=bits, form="pack-quantized"))


@pytest.mark.slow
@needs_smollm2
@pytest.mark.parametrize("bits", [3, 4])
def test_smollm2(tmp_path, bits):
    model = load_model("smollm2-135m", dtype="float16")
    dense = save_model(model, tmp_path / "model", like="smollm2-135m")
    settings = {"group_size": 64, "symmetric": False}
    there = packed_there(dense, tmp_path / "there", num_bits=bits, **settings)
    check_same(there, 1e-3)  # logits reach 30
    here = ours.rounded(dense, tmp_path / "here", bits=bits, **settings, form="pack-quantized")
    check_same(here, 1e-3)
