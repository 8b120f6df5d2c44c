"""Norms and biases in PEFT's files.

PEFT's LN_TUNING trains whole norms, and reads the biases beside them that the model has. A bias
that the model lacks has no place there: with one, the file is a LORA whose updates are zeros and
whose `lora_bias` holds the new biases. The invariant: every tensor of the file is used.
"""

from pathlib import Path

import jax.numpy as jnp
import numpy as np

from idp_jax.formats.peft_files import other_model
from idp_jax.formats.peft_keys import module_matches
from idp_jax.formats.peft_lora import PREFIX, lora_files
from idp_jax.formats.peft_places import places_of
from idp_jax.models.abstract import abstract
from idp_jax.models.config import ModelConfig
from idp_jax.models.decoder import Decoder
from idp_jax.models.matrices import matrices
from idp_jax.recover.lora import LoraAdapter
from idp_jax.recover.norms import NormsAndBiases
from idp_jax.recover.replaced import parameter

_COPY = "ln_tuning_layers."


def norms_files(adapter: NormsAndBiases, config: ModelConfig):
    """The settings and tensors of PEFT's two files."""
    new = adapter.new(abstract(config))
    if new:
        settings, tensors = lora_files(_as_lora(adapter, config, new), config)
        return {**settings, "peft_type": "LORA"}, tensors
    tensors, targets = {}, {}
    for name, place in places_of(config).items():
        if place.path not in adapter.values:
            continue
        module, _, leaf = name.rpartition(".")
        value = np.asarray(adapter.values[place.path][...])
        value = value if place.layer is None else value[place.layer]
        inner = _COPY if _is_norm(place.path) else ""
        if inner:
            targets[module.rpartition(".")[2]] = None
        tensors[f"{PREFIX}{module}.{inner}{leaf}"] = value
    return {"target_modules": list(targets)}, tensors


def read_norms(decoder: Decoder, folder: Path, settings, tensors) -> NormsAndBiases:
    """Makes the adapter of what PEFT's two files hold.

    Raises:
        ValueError: the file and the settings contradict each other, or belong to another model.
    """
    places, values = places_of(decoder.config), {}
    targets = [
        name
        for name, place in places.items()
        if _is_norm(place.path)
        and module_matches(settings["target_modules"], name.rpartition(".")[0])
        and not module_matches(settings["exclude_modules"], name.rpartition(".")[0])
    ]
    held = {full.removeprefix(PREFIX).replace(_COPY, ""): value for full, value in tensors.items()}
    for name in targets:
        if name not in held:
            raise ValueError(f"{folder}: the settings tune {name}, of which the file holds nothing")
    for name, value in held.items():
        place = places.get(name)
        known = place is not None and (name in targets or place.path.endswith(".bias"))
        if place is None or not known:
            raise other_model(folder, f"the tensor {name}", "no such norm or bias")
        if value.shape != place.shape:
            raise other_model(folder, f"{name} of {value.shape}", str(place.shape))
        if place.path not in values:
            values[place.path] = np.array(parameter(decoder, place.path))
        values[place.path][... if place.layer is None else place.layer] = value
    return NormsAndBiases({path: jnp.asarray(value) for path, value in values.items()})


def _is_norm(path: str) -> bool:
    return "norm" in path


def _as_lora(adapter: NormsAndBiases, config: ModelConfig, new) -> LoraAdapter:
    """Updates of rank 1 that are zeros, with the new biases; the rest are whole parameters."""
    a, b, layers = {}, {}, config.num_layers
    for matrix in matrices(config):
        if matrix.name in new:
            a[matrix.name] = jnp.zeros((layers, matrix.inputs, 1), jnp.float32)
            b[matrix.name] = jnp.zeros((layers, 1, matrix.outputs), jnp.float32)
    rest = {
        path: value[...]
        for path, value in adapter.values.items()
        if path not in {f"layers.{name}.bias" for name in new}
    }
    return LoraAdapter(a, b, 1.0, bias=new, replaced=rest)
