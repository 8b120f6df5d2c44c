"""Writes the golden folders: tiny random models as transformers saves them, and its logits.

Run `python -m tests.golden.generate` (needs torch) after a change of `cases.py`; the tests read
what it wrote.
"""

import shutil
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.golden.cases import CASES, batch

FOLDER = Path(__file__).parent


def random_model(config: dict, seed: int = 0, dtype: str = "float32"):
    """A transformers model whose every parameter is random, norms and biases included.

    Args:
        dtype: the precision that the values are rounded to; they are held as float32.
    """
    values = dict(config)
    kind = values.pop("model_type")
    hf_config = AutoConfig.for_model(kind, **values)
    model = AutoModelForCausalLM.from_config(hf_config, attn_implementation="eager").float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 2:
                value = noise * (0.5 if "embed" in name else parameter.shape[1] ** -0.5)
            else:
                value = noise * 0.3 + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
            parameter.copy_(value.to(getattr(torch, dtype)).float())
    return model


def positions_from(mask: np.ndarray) -> np.ndarray:
    """The position of every token as generation computes it, from the mask."""
    return np.maximum(np.cumsum(mask, -1) - 1, 0)


def run(model, ids: np.ndarray, mask: np.ndarray, **options):
    """transformers' output with positions taken from the mask (which OPT does by itself)."""
    extra = {}
    if model.config.model_type == "llama":
        extra["position_ids"] = torch.tensor(positions_from(mask))
    with torch.no_grad():
        return model(
            torch.tensor(ids, dtype=torch.long),
            attention_mask=torch.tensor(mask),
            **extra,
            **options,
        )


def write(name: str) -> None:
    """Writes one case: the folder of the model and `expected.npz`."""
    config, dtype, shard_bytes = CASES[name]
    folder = FOLDER / name
    shutil.rmtree(folder, ignore_errors=True)
    model = random_model(config, seed=sorted(CASES).index(name), dtype=dtype)
    ids, mask = batch()
    logits = run(model, ids, mask).logits.float().numpy()
    extra = {} if shard_bytes is None else {"max_shard_size": shard_bytes}
    model.to(getattr(torch, dtype)).save_pretrained(folder, **extra)
    (folder / "generation_config.json").unlink(missing_ok=True)
    real = mask.astype(bool)
    np.savez_compressed(
        folder / "expected.npz",
        input_ids=ids,
        attention_mask=mask,
        logits=logits[real].astype(np.float32),
    )


def main() -> None:
    """Writes every case."""
    for name in CASES:
        write(name)
        size = sum(file.stat().st_size for file in (FOLDER / name).iterdir())
        print(f"{name}: {size} bytes")


if __name__ == "__main__":
    main()
