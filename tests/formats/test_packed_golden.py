"""Folders that GPTQModel and compressed-tensors packed, expanded without them, bit for bit."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from idp_jax import load_model

PACKED = Path(__file__).parent.parent / "golden" / "packed"
CASES = sorted(folder.name for folder in PACKED.iterdir())


def expanded(model) -> dict[str, np.ndarray]:
    """The matrices of the layers as a library names and lays them out, float32 [out, in]."""
    matrices = {}
    for name in model.layers.weight_names:
        kernels = np.asarray(getattr(model.layers, name).kernel[...].astype(jnp.float32))
        module = "self_attn" if name in ("q", "k", "v", "o") else "mlp"
        for layer, kernel in enumerate(kernels):
            matrices[f"model.layers.{layer}.{module}.{name}_proj.weight"] = kernel.T
    return matrices


@pytest.mark.parametrize("case", CASES)
def test_weights_are_those_of_the_library(case):
    theirs = np.load(PACKED / case / "weights.npz")
    # A file in bfloat16 is expanded in bfloat16 by the library, so by us as well.
    ours = expanded(load_model(PACKED / case, weights="dense", dtype="auto"))
    assert ours.keys() == {name for name in theirs if "norm" not in name}
    different = [name for name in ours if not np.array_equal(ours[name], theirs[name])]
    assert not different


@pytest.mark.parametrize("case", ["gptq-3bit", "gptq-4bit-zero-0", "gptq_p-3bit"])
def test_zero_points_of_0_are_among_them(case):
    theirs = np.load(PACKED / case / "weights.npz")
    assert all((theirs[name][:5] >= 0).all() for name in theirs)


def test_every_library_is_there():
    writers = [json.loads((PACKED / case / "writer.json").read_text()) for case in CASES]
    assert {"gptqmodel", "compressed-tensors"} <= {name for writer in writers for name in writer}
