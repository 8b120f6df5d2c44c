"""Stored logits of transformers, reproduced without torch."""

import json
from pathlib import Path

import numpy as np
import pytest

from idp_jax import load_model

GOLDEN = Path(__file__).parent.parent / "golden"
CASES = sorted(file.parent.name for file in GOLDEN.glob("*/expected.npz"))
# Both sides compute in float32 and differ by the order of their sums.
TOLERANCE = 1e-5


def test_all_cases_are_stored():
    from tests.golden import cases

    assert sorted(cases.CASES) == CASES


@pytest.mark.parametrize("case", CASES)
def test_logits_match_transformers(case):
    expected = np.load(GOLDEN / case / "expected.npz")
    mask = expected["attention_mask"]
    logits = load_model(GOLDEN / case)(expected["input_ids"], mask)
    difference = np.abs(np.asarray(logits)[mask.astype(bool)] - expected["logits"])
    assert difference.max() <= TOLERANCE


@pytest.mark.parametrize("case", ["llama-biases", "opt-no-affine"])
def test_file_dtype_is_kept_on_demand(case):
    model = load_model(GOLDEN / case, dtype="auto")
    assert (
        model.embedding[...].dtype.name
        == json.loads((GOLDEN / case / "config.json").read_text())["dtype"]
    )
    logits = np.asarray(model(np.load(GOLDEN / case / "expected.npz")["input_ids"]))
    assert logits.dtype == np.float32 and np.isfinite(logits).all()


def test_the_sharded_case_is_sharded():
    assert len(list((GOLDEN / "llama-sharded").glob("*.safetensors"))) > 2
