"""Folders that GPTQModel and compressed-tensors packed, expanded without them, bit for bit."""

import json
from pathlib import Path

import numpy as np
import pytest

from idp_jax import load_model
from tests.interop.ours import differing

PACKED = Path(__file__).parent.parent / "golden" / "packed"
CASES = sorted(folder.name for folder in PACKED.iterdir())


@pytest.mark.parametrize("case", CASES)
def test_weights_are_those_of_the_library(case):
    theirs = np.load(PACKED / case / "weights.npz")
    # A file in bfloat16 is expanded in bfloat16 by the library, so by us as well.
    model = load_model(PACKED / case, weights="dense", dtype="auto")
    wanted = {name: matrix for name, matrix in theirs.items() if "norm" not in name}
    assert differing(model, wanted) == []


@pytest.mark.parametrize("case", ["gptq-3bit", "gptq-4bit-zero-0", "gptq_p-3bit"])
def test_zero_points_of_0_are_among_them(case):
    theirs = np.load(PACKED / case / "weights.npz")
    assert all((theirs[name][:5] >= 0).all() for name in theirs)


def test_every_library_is_there():
    writers = [json.loads((PACKED / case / "writer.json").read_text()) for case in CASES]
    assert {"gptqmodel", "compressed-tensors"} <= {name for writer in writers for name in writer}
