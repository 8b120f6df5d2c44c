"""An adapter and its model as one model folder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from idp_jax.config import Merge
from idp_jax.formats.adapters import read_adapter
from idp_jax.formats.load import load_model
from idp_jax.formats.write import save_model
from idp_jax.jobs.folder import check_absent, check_writable
from idp_jax.models.decoder import Decoder
from idp_jax.models.matrices import matrices
from idp_jax.recover.merge import merged


def merge(settings: Merge, *, progress: Callable = iter) -> Path:
    """Writes the model that computes alone what it computes with the adapter beside it.

    Args:
        progress: wraps the iteration over layers, for a progress bar.

    Raises:
        ValueError: the model or adapter cannot be read, `out` exists, or as `merged`.
    """
    check_absent(settings.out, overwrite=settings.overwrite)
    check_writable(settings.out)
    model = load_model(
        settings.model, dtype=settings.dtype, kernel="xla", use_sparse24=False, progress=progress
    )
    adapter = read_adapter(model, settings.adapter)
    whole = merged(adapter, model, lose_zeros=settings.dense)
    return save_model(
        whole,
        settings.out,
        like=settings.model,
        changes=_changes(whole),
        overwrite=settings.overwrite,
    )


def _changes(model: Decoder) -> dict[str, Any]:
    """What config.json must say of biases and a head that the model did not have before."""
    config, changes = model.config, {}
    if config.tied_embeddings and model.head is not None:
        changes["tie_word_embeddings"] = False
    for matrix in matrices(config):
        if getattr(model.layers, matrix.name).bias is None or matrix.bias:
            continue
        of_llama = "attention_bias" if matrix.stage < 2 else "mlp_bias"
        changes["enable_bias" if config.architecture == "opt" else of_llama] = True
    return changes
