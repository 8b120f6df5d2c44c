"""From one storage form of a model to another, without changing a number of it.

The invariant: one block is in memory at a time (and the shard that is being filled), so a model may
be larger than the machine.
"""

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np

from idp_jax.config import Convert
from idp_jax.formats.hf import Reader, block_packings, block_tensors, outer_tensors
from idp_jax.formats.quantization import (
    PACK_QUANTIZED,
    PACKED_FORMS,
    SPARSE_FORMS,
    Packing,
    write_config,
)
from idp_jax.formats.source import open_source
from idp_jax.formats.write import Shards, write_settings
from idp_jax.jobs.folder import check_absent, check_writable, written_folder

_log = logging.getLogger(__name__)


def convert(settings: Convert, *, progress: Callable = iter) -> Path:
    """Writes a model folder in another form.

    Args:
        progress: wraps the iteration over layers, for a progress bar.

    Raises:
        ValueError: the source cannot be read, `out` exists, or the form cannot hold the model.
    """
    check_absent(settings.out, overwrite=settings.overwrite)
    check_writable(settings.out)
    source = open_source(settings.model)
    reader = Reader(source, settings.dtype)
    _check(reader, settings)
    packings: dict[str, Packing | None] = {}
    layers = range(reader.config.num_layers)
    with written_folder(settings.out, overwrite=settings.overwrite) as folder:
        shards, outer = Shards(folder), reader.without_layers()
        dtype = np.asarray(outer.embedding[...]).dtype
        shards.extend(outer_tensors(outer))
        del outer
        for layer in progress(layers):
            block = reader.block(layer)
            packings |= block_packings(reader.config, layer, block, reader.layout)
            tensors = block_tensors(reader.config, layer, block, settings.to, dtype=dtype)
            shards.extend(tensors)
        reader.check_all_used()
        shards.close()
        write_settings(folder, settings.model, write_config(settings.to, packings), dtype)
    if settings.to == PACK_QUANTIZED:
        _warn_of_act_order(packings)
    return settings.out


def _check(reader: Reader, settings: Convert) -> None:
    """Refuses what no conversion can do, before anything is read."""
    packed = reader.layout is not None and reader.layout.form not in SPARSE_FORMS
    if settings.to in PACKED_FORMS and not packed:
        raise ValueError(
            f"{settings.model} is not packed, so it cannot become {settings.to}; compress it first "
            "(idp-jax compress)"
        )
    if settings.to in SPARSE_FORMS and packed:
        raise ValueError(
            f"{settings.model} is packed, so it cannot become {settings.to}; give a pruned model"
        )


def _warn_of_act_order(packings: dict[str, Packing | None]) -> None:
    ordered = [name for name, packing in packings.items() if packing and packing.act_order]
    if ordered:
        _log.warning(
            "%d matrices such as %s are in act-order: transformers, and compressed-tensors from "
            "0.18 on, ignore weight_g_idx and misread them; gptq_v2 is read with it",
            len(ordered),
            ordered[0],
        )
