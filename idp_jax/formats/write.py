"""`save_model`, and what writes a model's folder piece by piece."""

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from idp_jax.formats import hf
from idp_jax.formats.folder import copy_sidecars
from idp_jax.formats.load import load_tokenizer
from idp_jax.formats.quantization import DENSE, PLANAR, Layout, Packing, read_config, write_config
from idp_jax.formats.source import open_source, resolve
from idp_jax.jobs.files import write_json
from idp_jax.jobs.folder import written_folder
from idp_jax.models.block import layer_slice
from idp_jax.models.decoder import Decoder
from idp_jax.models.storage import restore

_log = logging.getLogger(__name__)
MAX_SHARD_BYTES = 1_000_000_000  # also what a streamed write holds in memory


def save_model(
    model: Decoder,
    out: str | Path,
    *,
    like: str | Path,
    quantization: dict[str, Any] | None = None,
    report: dict[str, Any] | None = None,
    changes: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes a Hugging Face folder: config.json, safetensors (in shards), tokenizer and the like.

    Args:
        like: the model this one came from; its configuration is taken, and the files that belong
            to a model (tokenizer, chat template, generation_config.json, licence) are copied.
        quantization: config.json's `quantization_config` where matrices are packed; by default
            in the form of `like`.
        report: written to `compression.json` beside the weights.
        changes: what config.json says otherwise than that of `like`.

    Raises:
        ValueError: `out` exists, or packed matrices have no settings that fit them.
    """
    model = restore(model)
    source = open_source(like)
    layout = read_config(quantization or source.quantization)
    packings: dict[str, Packing | None] = {}
    for layer in range(model.config.num_layers):
        block = layer_slice(model.layers, layer)
        packings |= hf.block_packings(model.config, layer, block, layout)
    packed = any(packing is not None for packing in packings.values())
    if packed and layout is None:
        raise ValueError(
            "the model is packed, but no settings say in which form; pass `quantization`"
        )
    form = layout.form if packed and layout is not None else DENSE
    form = "gptq_v2" if form == PLANAR else form
    if quantization is not None:
        _check_announced(read_config(quantization), packings)
    with written_folder(Path(out), overwrite=overwrite, sources={"like": like}) as folder:
        shards = Shards(folder)
        shards.extend(hf.disassemble(model, form=form))
        shards.close()
        settings = (quantization if packed else None) or write_config(form, packings)
        dtype = np.asarray(model.embedding[...]).dtype
        write_settings(folder, like, settings, dtype, changes)
        if report is not None:
            write_json(folder / "compression.json", report)
    return Path(out)


def _check_announced(layout: Layout | None, packings: dict[str, Packing | None]) -> None:
    """Refuses settings that another reader would unpack these matrices wrongly by."""
    for name, packing in packings.items():
        announced = None if layout is None else layout.packing(name)
        if packing is not None and (announced is None or announced.bits != packing.bits):
            said = "nothing of it" if announced is None else f"{announced.bits} bits"
            raise ValueError(
                f"{name} is packed to {packing.bits} bits, its quantization settings say {said}; "
                "pass `quantization`"
            )


def write_settings(
    folder: Path,
    like: str | Path,
    quantization: dict[str, Any] | None,
    dtype,
    changes: Mapping[str, Any] | None = None,
) -> None:
    """Writes config.json (and GPTQ's quantize_config.json) of a model folder, and its sidecars.

    Args:
        like: the model whose configuration, tokenizer and other files these are.
        quantization: its `quantization_config`; None where nothing is packed.
        dtype: of embeddings, norms and dense matrices.
        changes: what config.json says otherwise than that of `like`.
    """
    config = open_source(like).hf_config
    for key, value in (changes or {}).items():
        setattr(config, key, value)
    # A dense model that came from a packed one must not be announced as packed.
    for key in ("quantization_config", "compression_config"):
        vars(config).pop(key, None)
    if quantization is not None:
        config.quantization_config = quantization
        if quantization["quant_method"] == "gptq":
            (folder / "quantize_config.json").write_text(json.dumps(quantization, indent=2))
    config.dtype = str(dtype)
    config.save_pretrained(folder)
    origin = resolve(like)
    if origin.is_dir():
        copy_sidecars(origin, folder)
        return
    try:
        tokenizer = load_tokenizer(origin)
    except ValueError as error:
        _log.warning("%s is written without a tokenizer: %s", folder, error)
        return
    tokenizer.save_pretrained(folder)


def _check_finite(name: str, tensor: np.ndarray) -> None:
    if tensor.dtype.kind not in "fV":  # V: numpy's kind of bfloat16
        return
    wrong = tensor.size - int(np.isfinite(tensor).sum())
    if wrong:
        raise ValueError(
            f"{name} would hold {wrong} numbers of {tensor.size} that are not finite, beyond "
            f"{tensor.dtype}; write it as float32 or bfloat16 (--dtype), and merge no update that "
            "has diverged"
        )


class Shards:
    """Writes tensors one by one into the safetensors files of a folder.

    A shard waits in memory until it is full, so no more than `MAX_SHARD_BYTES` are held at a time
    (or one tensor that is larger). The files take their final names in `close`, when their number
    is known.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._held: dict[str, np.ndarray] = {}
        self._written: list[tuple[Path, list[str]]] = []
        self._bytes = self._total = 0

    def add(self, name: str, tensor: np.ndarray) -> None:
        """Takes one tensor; a full shard is written first.

        Raises:
            ValueError: it holds numbers that are not finite, which no reader would take.
        """
        _check_finite(name, tensor)
        if self._held and self._bytes + tensor.nbytes > MAX_SHARD_BYTES:
            self._flush()
        self._held[name] = np.ascontiguousarray(tensor)
        self._bytes += tensor.nbytes
        self._total += tensor.nbytes

    def extend(self, tensors: Iterable[tuple[str, np.ndarray]]) -> None:
        """Takes tensors one after the other."""
        for name, tensor in tensors:
            self.add(name, tensor)

    def close(self) -> None:
        """Writes what is left, and the index where there is more than one file."""
        self._flush()
        places, count = {}, len(self._written)
        for number, (file, names) in enumerate(self._written, 1):
            suffix = "" if count == 1 else f"-{number:05d}-of-{count:05d}"
            places |= dict.fromkeys(names, f"model{suffix}.safetensors")
            file.rename(self._folder / f"model{suffix}.safetensors")
        if count > 1:
            index = {"metadata": {"total_size": self._total}, "weight_map": places}
            (self._folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))

    def _flush(self) -> None:
        from safetensors.numpy import save_file

        file = self._folder / f"{len(self._written)}.part"
        save_file(self._held, file, metadata={"format": "pt"})
        self._written.append((file, list(self._held)))
        self._held, self._bytes = {}, 0
