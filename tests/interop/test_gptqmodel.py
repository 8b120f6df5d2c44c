"""Folders exchanged with GPTQModel: equal weights bit for bit, and the same logits."""

import importlib.util

import pytest

from idp_jax import load_model, save_model
from tests.helpers import needs_smollm2
from tests.interop import gptqmodel_side, ours

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("gptqmodel") is None,
        reason="GPTQModel is missing: make interop runs this in an environment that has it",
    ),
    pytest.mark.filterwarnings("default"),  # the library's own
]

WRITTEN_THERE = {
    "3bit-group32": {"bits": 3, "group_size": 32, "sym": False},
    "4bit-group32": {"bits": 4, "group_size": 32, "sym": False},
    "3bit-group64-symmetric": {"bits": 3, "group_size": 64, "sym": True},
    "4bit-group64-v2": {"bits": 4, "group_size": 64, "sym": False, "format": "gptq_v2"},
    "3bit-rows-v2": {"bits": 3, "group_size": -1, "sym": False, "format": "gptq_v2"},
    "4bit-rows-symmetric": {"bits": 4, "group_size": -1, "sym": True},
    "3bit-act-order": {"bits": 3, "group_size": 32, "sym": False, "desc_act": True},
    "4bit-act-order-v2": {
        "bits": 4,
        "group_size": 32,
        "sym": True,
        "desc_act": True,
        "format": "gptq_v2",
    },
    "3bit-planar": {"bits": 3, "group_size": 32, "sym": False, "format": "gptq_p"},
}
WRITTEN_HERE = {
    "3bit-group32": {"bits": 3, "group_size": 32, "symmetric": False, "form": "gptq_v2"},
    "4bit-group32": {"bits": 4, "group_size": 32, "symmetric": False, "form": "gptq_v2"},
    "3bit-group64-v1": {"bits": 3, "group_size": 64, "symmetric": True, "form": "gptq"},
    "4bit-group64-v1": {"bits": 4, "group_size": 64, "symmetric": True, "form": "gptq"},
    "3bit-rows": {"bits": 3, "group_size": -1, "symmetric": False, "form": "gptq_v2"},
    "4bit-rows": {"bits": 4, "group_size": -1, "symmetric": True, "form": "gptq_v2"},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return ours.tiny_source(tmp_path_factory.mktemp("source") / "model")


def check_same(folder, tolerance: float = ours.TOLERANCE) -> None:
    ours.check_same(folder, gptqmodel_side.Loaded(folder), tolerance)


@pytest.mark.parametrize("case", WRITTEN_THERE)
def test_written_there_read_here(source, tmp_path, case):
    settings = dict(WRITTEN_THERE[case])
    if settings["group_size"] == -1:
        settings["act_group_aware"] = False  # its default order is one of groups
    check_same(gptqmodel_side.quantise(source, tmp_path / "packed", **settings))


def test_groups_that_do_not_divide_the_inputs(tmp_path):
    source = ours.tiny_source(tmp_path / "model", hidden_dim=96, num_heads=3, num_kv_heads=3)
    settings = {"bits": 4, "group_size": 64, "sym": False}
    check_same(gptqmodel_side.quantise(source, tmp_path / "packed", **settings))


@pytest.mark.parametrize("case", WRITTEN_HERE)
def test_written_here_read_there(source, tmp_path, case):
    check_same(ours.rounded(source, tmp_path / "packed", **WRITTEN_HERE[case]))


@pytest.mark.parametrize("act_order", [False, True], ids=["runs", "act-order"])
@pytest.mark.parametrize("bits", [3, 4])
def test_every_zero_point_survives(tmp_path, bits, act_order):
    folder = tmp_path / "packed"
    check_same(ours.random_codes(folder, bits=bits, form="gptq_v2", act_order=act_order))


def test_asymmetric_v1_of_another_program_is_refused_there(source, tmp_path):
    """Why gptq_v2 is what is written here by default."""
    settings = {"bits": 4, "group_size": 32, "symmetric": False, "form": "gptq"}
    folder = ours.rounded(source, tmp_path / "packed", **settings)
    with pytest.raises(ValueError, match="sym=False"):
        gptqmodel_side.Loaded(folder)


@pytest.mark.slow
@needs_smollm2
class TestSmolLM2:
    """The same with a real model; its logits reach 30."""

    TOLERANCE = 1e-3

    @pytest.fixture(scope="class")
    def dense(self, tmp_path_factory):
        model = load_model("smollm2-135m", dtype="float16")
        return save_model(model, tmp_path_factory.mktemp("smollm2") / "model", like="smollm2-135m")

    @pytest.mark.parametrize("bits", [3, 4])
    def test_written_there_read_here(self, dense, tmp_path, bits):
        settings = {"bits": bits, "group_size": 64, "sym": False, "windows": 2}
        folder = gptqmodel_side.quantise(dense, tmp_path / "packed", **settings)
        check_same(folder, self.TOLERANCE)

    @pytest.mark.parametrize("bits", [3, 4])
    def test_written_here_read_there(self, dense, tmp_path, bits):
        settings = {"bits": bits, "group_size": 64, "symmetric": False, "form": "gptq_v2"}
        check_same(ours.rounded(dense, tmp_path / "packed", **settings), self.TOLERANCE)
