"""Writes the golden folders in `packed/`: a tiny model as GPTQModel and compressed-tensors pack it.

Beside each folder's own files lies `weights.npz`: every matrix of the layers as that library
expands it, float32 [out, in]. `make golden-packed` writes them again, in the environment of
`make interop`; the tests read what it wrote. Older releases of compressed-tensors, which wrote what
later ones cannot read, are fetched into a scratch folder and run in a process of their own.
"""

import argparse
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from tests.golden.generate import random_model
from tests.interop import compressed_tensors_side, gptqmodel_side

FOLDER = Path(__file__).parent / "packed"
_CONFIG = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "architectures": ["LlamaForCausalLM"],
}
_GROUPS = {"strategy": "group", "group_size": 16}

# Case -> (library, its release where not the newest, settings).
CASES: dict[str, tuple[str, str | None, dict]] = {
    "gptq-3bit": (
        "gptqmodel",
        None,
        {"bits": 3, "group_size": 16, "sym": False, "positive_rows": 5},
    ),
    "gptq-4bit-act-order": (
        "gptqmodel",
        None,
        {"bits": 4, "group_size": 16, "sym": False, "desc_act": True},
    ),
    # Zeros of 0, which in 4 bits GPTQModel shifts by the word: neighbours borrow from each other.
    "gptq-4bit-zero-0": (
        "gptqmodel",
        None,
        {"bits": 4, "group_size": 16, "sym": False, "positive_rows": 5},
    ),
    "gptq_v2-4bit-rows": (
        "gptqmodel",
        None,
        {
            "bits": 4,
            "group_size": -1,
            "sym": True,
            "act_group_aware": False,
            "format": "gptq_v2",
        },
    ),
    "gptq_p-3bit": (
        "gptqmodel",
        None,
        {"bits": 3, "group_size": 16, "sym": False, "format": "gptq_p", "positive_rows": 5},
    ),
    "pack-quantized-3bit": (
        "compressed-tensors",
        None,
        {"num_bits": 3, "symmetric": True, **_GROUPS},
    ),
    "pack-quantized-4bit-bfloat16": (
        "compressed-tensors",
        None,
        {"num_bits": 4, "symmetric": False, "dtype": "bfloat16", **_GROUPS},
    ),
    "pack-quantized-3bit-10-a-word": (
        "compressed-tensors",
        "0.17.1",
        {"num_bits": 3, "symmetric": False, "strategy": "channel"},
    ),
    "pack-quantized-4bit-act-order": (
        "compressed-tensors",
        "0.17.1",
        {"num_bits": 4, "symmetric": True, "act_order_seed": 3, **_GROUPS},
    ),
    "sparse-bitmask": ("compressed-tensors", "0.9.4", {"format": "sparse-bitmask"}),
    # Until 0.8 every tensor was stored so, norms and embedding too, under its whole name.
    "sparse-bitmask-all": ("compressed-tensors", "0.8.1", {"format": "sparse-bitmask"}),
    "sparse-24-bitmask": ("compressed-tensors", "0.9.4", {"format": "sparse-24-bitmask"}),
}


def _model(seed: int, dtype: str = "float16"):
    """The model to pack; its values fit the given precision, but it computes in float32."""
    return random_model(_CONFIG, seed=seed, dtype=dtype)


def _write_gptqmodel(
    folder: Path, seed: int, settings: dict, *, positive_rows: int = 0
) -> dict[str, np.ndarray]:
    """One case of GPTQModel.

    Args:
        positive_rows: outputs of every matrix without a negative weight; their zero point is 0.
    """
    from tests.helpers import tiny_tokenizer

    model = _model(seed)
    for name, parameter in model.named_parameters():
        if ".layers." in name and parameter.ndim == 2:
            parameter.data[:positive_rows] = parameter.data[:positive_rows].abs() + 0.25
    with tempfile.TemporaryDirectory() as scratch:
        model.half().save_pretrained(scratch)
        tiny_tokenizer().save_pretrained(scratch)
        gptqmodel_side.quantise(Path(scratch), folder, **settings)
    weights = gptqmodel_side.Loaded(folder).weights()
    for file in (*folder.glob("tokenizer*"), folder / "quant_log.csv"):
        file.unlink()
    return weights


def _write_packed(folder: Path, seed: int, settings: dict, *, dtype: str = "float32"):
    model = _model(seed).to(getattr(torch, dtype))
    compressed_tensors_side.pack(model, folder, **settings)
    return compressed_tensors_side.expanded(model)


def _write_sparse(folder: Path, seed: int, settings: dict) -> dict[str, np.ndarray]:
    """One sparse case, with releases of compressed-tensors that still know sparsity."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.config import SparsityCompressionConfig
    from safetensors.torch import save_file

    model = _model(seed).half()
    for name, parameter in model.named_parameters():
        if ".layers." in name and parameter.ndim == 2:
            parameter.data.copy_(_pruned(parameter.data))
    structure = "2:4" if "24" in settings["format"] else "unstructured"
    compressor = ModelCompressor(
        sparsity_config=SparsityCompressionConfig.load_from_registry(
            settings["format"],
            targets=["Linear"],
            ignore=["lm_head"],
            global_sparsity=0.5,
            sparsity_structure=structure,
        )
    )
    tensors = model.state_dict()
    del tensors["lm_head.weight"]  # tied
    compressed = compressor.compress(model, tensors)
    folder.mkdir(parents=True)
    save_file(
        {name: tensor.contiguous() for name, tensor in compressed.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    model.config.save_pretrained(folder)
    compressor.update_config(str(folder))
    expanded = dict(compressor.sparsity_compressor.decompress(str(folder)))
    return {name: t.float().numpy() for name, t in expanded.items() if ".layers." in name}


def _pruned(weight: torch.Tensor) -> torch.Tensor:
    """2:4 sparse; every 16th run of four keeps a single weight, every 32nd none."""
    runs = weight.reshape(-1, 4)
    order = runs.abs().argsort(dim=1, descending=True).argsort(dim=1)
    kept = torch.full((len(runs), 1), 2)
    kept[::16], kept[::32] = 1, 0
    return (runs * (order < kept)).reshape(weight.shape)


def _write(name: str) -> None:
    """Writes one case with whatever release is installed in this process."""
    library, _, settings = CASES[name]
    folder, seed = FOLDER / name, sorted(CASES).index(name)
    shutil.rmtree(folder, ignore_errors=True)
    settings = dict(settings)
    if library == "gptqmodel":
        positive_rows = settings.pop("positive_rows", 0)
        weights = _write_gptqmodel(folder, seed, settings, positive_rows=positive_rows)
    elif "format" in settings:
        weights = _write_sparse(folder, seed, settings)
    else:
        dtype = settings.pop("dtype", "float32")
        weights = _write_packed(folder, seed, settings, dtype=dtype)
    (folder / "generation_config.json").unlink(missing_ok=True)
    np.savez_compressed(folder / "weights.npz", **weights)
    (folder / "writer.json").write_text(
        json.dumps({package: importlib.metadata.version(package) for package in (library, "torch")})
    )
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{name}: {len(weights)} matrices, {size} bytes", flush=True)


def _write_with_release(name: str, scratch: Path) -> None:
    """Runs one case in a process that sees another release first on its path."""
    library, release, _ = CASES[name]
    place = scratch / f"{library}-{release}"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--target", str(place), f"{library}=={release}"], check=True)
    path = os.pathsep.join([str(place), str(Path(__file__).parents[2])])
    subprocess.run(
        [sys.executable, "-m", "tests.golden.packed_generate", "--case", name, "--in-process"],
        env={**os.environ, "PYTHONPATH": path},
        check=True,
    )


def main() -> None:
    """Writes the cases that are asked for, by default all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", action="append", choices=CASES, help="which; by default all")
    parser.add_argument(
        "--in-process", action="store_true", help="with the installed release, whichever it is"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        for name in arguments.case or CASES:
            if CASES[name][1] is None or arguments.in_process:
                _write(name)
            else:
                _write_with_release(name, Path(scratch))


if __name__ == "__main__":
    main()
