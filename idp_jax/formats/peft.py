"""One adapter on disk, in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

`PEFT_FORMS` has an entry for every class of adapter that PEFT knows too.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from idp_jax.formats.names import NAMES
from idp_jax.models.config import ModelConfig
from idp_jax.models.decoder import Decoder
from idp_jax.models.matrices import matrices
from idp_jax.recover.lora import LoraAdapter
from idp_jax.recover.methods import Adapter
from idp_jax.recover.prefix import PrefixAdapter
from idp_jax.recover.prompt import SoftPrompt


def write_peft(adapter: Adapter, folder: Path, decoder: Decoder, base: str) -> None:
    """Writes the two files of an adapter."""
    from safetensors.numpy import save_file

    peft_type, form = next(
        (name, form) for name, form in PEFT_FORMS.items() if form.adapter is type(adapter)
    )
    settings, tensors = form.files(adapter, decoder.config)
    common = {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "peft_type": peft_type,
    }
    tensors = {name: np.ascontiguousarray(value, np.float32) for name, value in tensors.items()}
    (folder / "adapter_config.json").write_text(json.dumps({**common, **settings}, indent=2))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def read_peft(decoder: Decoder, folder: Path) -> Adapter:
    """Reads an adapter.

    Raises:
        ValueError: there is none, one of an unknown type, or one for another model.
    """
    if not (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{folder} holds no adapter_config.json and no pool.json; give an adapter's folder"
        )
    settings = read_json(folder / "adapter_config.json")
    tensors = read_tensors(folder / "adapter_model.safetensors")
    kind = settings.get("peft_type")
    if kind not in PEFT_FORMS:
        raise ValueError(
            f"{folder}: peft_type {kind!r} is not supported; supported: {', '.join(PEFT_FORMS)}"
        )
    try:
        return PEFT_FORMS[kind].read(decoder, folder, settings, tensors)
    except KeyError as error:
        raise ValueError(f"{folder} lacks {error}; save the adapter again") from error


def _prompt_files(adapter: SoftPrompt, config: ModelConfig):
    embeddings = np.asarray(adapter.embeddings[...])
    settings = {
        "num_layers": config.num_layers,
        "num_transformer_submodules": 1,
        "prompt_tuning_init": "RANDOM",
        "num_virtual_tokens": len(embeddings),
        "token_dim": config.embedding_dim,
        "num_attention_heads": config.num_heads,
    }
    return settings, {"prompt_embeddings": embeddings}


def _prefix_files(adapter: PrefixAdapter, config: ModelConfig):
    k, v = np.asarray(adapter.k[...]), np.asarray(adapter.v[...])
    rows = np.stack([k, v], 1)  # [L, 2, P, K, H]: layer l has K in row 2l and V in row 2l + 1
    length = rows.shape[2]
    settings = {
        "num_layers": config.num_layers,
        "num_transformer_submodules": 1,
        "prefix_projection": False,
        "num_virtual_tokens": length,
        "token_dim": config.head_dim * config.num_kv_heads,
        "num_attention_heads": config.num_kv_heads,
        "encoder_hidden_size": config.hidden_dim,
    }
    return settings, {"prompt_embeddings": np.moveaxis(rows, 2, 0).reshape(length, -1)}


def _lora_files(adapter: LoraAdapter, config: ModelConfig):
    names = NAMES[config.architecture]
    settings = {
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "fan_in_fan_out": False,
        "target_modules": [names.weights[name].rpartition(".")[2] for name in adapter.a],
    }
    tensors = {}
    for name in adapter.a:
        a, b = np.asarray(adapter.a[name][...]), np.asarray(adapter.b[name][...])
        for layer in range(config.num_layers):
            module = f"base_model.model.{names.weight(layer, name)}"
            tensors[f"{module}.lora_A.weight"] = a[layer].T
            tensors[f"{module}.lora_B.weight"] = b[layer].T
    return settings, tensors


def read_json(file: Path) -> dict[str, Any]:
    """The settings in a file; a ValueError where it holds none."""
    try:
        tree = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON ({error}); save the adapter again") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{file} holds no settings; save the adapter again")
    return tree


def read_tensors(file: Path) -> dict[str, np.ndarray]:
    """The tensors in a file; a ValueError where it is missing or damaged."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{file} is missing or damaged ({error}); save the adapter again"
        ) from error


def other_model(folder: Path, found: str, wanted: str) -> ValueError:
    """The error that refuses an adapter of another model."""
    return ValueError(
        f"the adapter {folder} was made for another model: it has {found}, this model needs "
        f"{wanted}"
    )


def _read_prompt(decoder: Decoder, folder: Path, settings, tensors) -> SoftPrompt:
    embeddings = tensors["prompt_embeddings"]
    wanted = (settings["num_virtual_tokens"], decoder.config.embedding_dim)
    if embeddings.shape != wanted:
        raise other_model(folder, f"prompt embeddings {embeddings.shape}", str(wanted))
    layers = settings.get("num_layers")
    if layers not in (None, decoder.config.num_layers):
        raise other_model(folder, f"{layers} layers", str(decoder.config.num_layers))
    return SoftPrompt(jnp.asarray(embeddings, jnp.float32))


def _read_prefix(decoder: Decoder, folder: Path, settings, tensors) -> PrefixAdapter:
    if settings.get("prefix_projection"):
        raise ValueError(f"{folder}: prefix_projection is not supported; merge it with PEFT first")
    config, flat = decoder.config, tensors["prompt_embeddings"]
    width = config.num_layers * 2 * config.num_kv_heads * config.head_dim
    if flat.shape[1] != width:
        raise other_model(folder, f"prefix rows of {flat.shape[1]}", str(width))
    shape = (len(flat), config.num_layers, 2, config.num_kv_heads, config.head_dim)
    rows = jnp.moveaxis(jnp.asarray(flat, jnp.float32).reshape(shape), 0, 2)
    return PrefixAdapter(rows[:, 0], rows[:, 1])


def _read_lora(decoder: Decoder, folder: Path, settings, tensors) -> LoraAdapter:
    for key in (
        "use_dora",
        "rank_pattern",
        "alpha_pattern",
        "layers_to_transform",
        "modules_to_save",
    ):
        if settings.get(key):
            raise ValueError(f"{folder}: LoRA with {key} is not supported")
    config, names = decoder.config, NAMES[decoder.config.architecture]
    a, b, used = {}, {}, 0
    for matrix in matrices(config):
        name = matrix.name
        modules = [f"base_model.model.{names.weight(i, name)}" for i in range(config.num_layers)]
        found = [m for m in modules if f"{m}.lora_A.weight" in tensors]
        if not found:
            continue
        if len(found) != len(modules):
            raise other_model(folder, f"{name} in {len(found)} layers", f"{len(modules)} layers")
        a[name] = np.stack([tensors[f"{m}.lora_A.weight"].T for m in modules])
        b[name] = np.stack([tensors[f"{m}.lora_B.weight"].T for m in modules])
        wanted = (matrix.inputs, matrix.outputs)
        if (a[name].shape[1], b[name].shape[2]) != wanted:
            raise other_model(
                folder, f"{name} of {(a[name].shape[1], b[name].shape[2])}", str(wanted)
            )
        used += 2 * len(modules)
    if not a or used != len(tensors):
        raise other_model(folder, f"{len(tensors)} LoRA tensors", f"{used} of them")
    rank = settings["r"]
    alpha = settings["lora_alpha"] * (rank**0.5 if settings.get("use_rslora") else 1.0)
    to_jax = lambda arrays: {
        name: jnp.asarray(value, jnp.float32) for name, value in arrays.items()
    }
    return LoraAdapter(to_jax(a), to_jax(b), alpha)


class PeftForm(NamedTuple):
    """How a class of adapters stands in PEFT's files.

    Attributes:
        files: (adapter, model's configuration) -> the settings and tensors of the two files.
        read: (decoder, folder, settings, tensors) -> the adapter.
    """

    adapter: type
    files: Callable[[Any, ModelConfig], tuple[dict[str, Any], dict[str, np.ndarray]]]
    read: Callable[..., Adapter]


PEFT_FORMS = {
    "PROMPT_TUNING": PeftForm(SoftPrompt, _prompt_files, _read_prompt),
    "PREFIX_TUNING": PeftForm(PrefixAdapter, _prefix_files, _read_prefix),
    "LORA": PeftForm(LoraAdapter, _lora_files, _read_lora),
}
