"""What GPTQModel itself does with a folder: quantise it, expand its weights, compute its logits.

The invariant: nothing of ours takes part, so that agreement with it means something.
"""

import contextlib
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np


def _library():
    """The module `gptqmodel`, imported with settings that suit small models on few cores."""
    # Every size of matrix would be compiled anew, for half a minute each.
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    # On two cores its pools ask for more workers than it would start.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "4")
    import gptqmodel

    return gptqmodel


def quantise(
    source: Path, out: Path, *, windows: int = 8, length: int = 64, **settings: Any
) -> Path:
    """Quantises a folder with GPTQModel's own defaults, calibrated on random tokens, in float32.

    Args:
        settings: of GPTQModel's `QuantizeConfig`.
    """
    gptqmodel = _library()
    import torch

    config = gptqmodel.QuantizeConfig(offload_to_disk=False, **settings)
    model = gptqmodel.GPTQModel.load(str(source), config, dtype=torch.float32)
    tokens = np.random.default_rng(0).integers(3, model.model.config.vocab_size, (windows, length))
    # It leaves a folder of logs wherever it runs.
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):
        model.quantize([row.tolist() for row in tokens])
    model.save(str(out))
    return out


class Loaded:
    """A quantised folder as GPTQModel reads it, computing in float32 with its PyTorch kernel."""

    def __init__(self, folder: Path):
        gptqmodel = _library()
        import torch

        # The kernel refuses to be loaded in float32, but scales turned to float32 lose nothing.
        kernel = gptqmodel.BACKEND.GPTQ_TORCH
        loaded = gptqmodel.GPTQModel.load(
            str(folder), backend=kernel, dtype=torch.float16, device="cpu"
        )
        self.model = loaded.model.float().eval()

    def weights(self) -> dict[str, np.ndarray]:
        """The dequantised matrices, float32 [out, in] by the name of their dense tensor."""
        from gptqmodel.nn_modules.qlinear import BaseQuantLinear

        return {
            f"{name}.weight": module.dequantize_weight().detach().numpy().T
            for name, module in self.model.named_modules()
            if isinstance(module, BaseQuantLinear)
        }
