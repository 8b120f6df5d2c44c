"""One adapter on disk, in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

`PEFT_FORMS` has an entry for every class of adapter that PEFT knows too.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from idp_jax.formats.peft_files import other_model, read_adapter_tensors, read_json
from idp_jax.formats.peft_keys import checked
from idp_jax.formats.peft_lora import lora_files, read_lora
from idp_jax.formats.peft_norms import norms_files, read_norms
from idp_jax.models.config import ModelConfig
from idp_jax.models.decoder import Decoder
from idp_jax.recover.lora import LoraAdapter, MaskedLora
from idp_jax.recover.methods import Adapter
from idp_jax.recover.norms import NormsAndBiases
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
        ValueError: there is none, one of an unknown type, one whose settings ask for something
            that is not done here, or one for another model.
    """
    file = folder / "adapter_config.json"
    if not file.is_file():
        raise ValueError(
            f"{folder} holds no adapter_config.json and no pool.json; give an adapter's folder"
        )
    tree = read_json(file)
    kind = tree.get("peft_type")
    if not isinstance(kind, str) or kind not in PEFT_FORMS:
        raise ValueError(
            f"{file}: peft_type {kind!r} is not supported; supported: {', '.join(PEFT_FORMS)}"
        )
    settings = checked(file, tree, kind)
    return PEFT_FORMS[kind].read(decoder, folder, settings, read_adapter_tensors(folder))


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


def _rows(folder: Path, settings, tensors, width: int) -> np.ndarray:
    """The only tensor of a prompt or prefix, [num_virtual_tokens, width]."""
    if set(tensors) != {"prompt_embeddings"}:
        raise ValueError(
            f"{folder} must hold prompt_embeddings alone, not {sorted(tensors)}; save the adapter "
            "again"
        )
    rows, count = tensors["prompt_embeddings"], settings["num_virtual_tokens"]
    if rows.ndim != 2 or len(rows) != count:
        raise ValueError(
            f"{folder}: prompt_embeddings of {rows.shape} do not have the {count} rows that "
            "num_virtual_tokens says; save the adapter again"
        )
    if rows.shape[1] != width:
        raise other_model(folder, f"rows of {rows.shape[1]} numbers", str(width))
    return rows


def _check_sizes(folder: Path, settings, **sizes: int) -> None:
    """Compares what the settings say of the model with the model."""
    for key, wanted in sizes.items():
        if settings[key] not in (None, wanted):
            raise other_model(folder, f"{key} {settings[key]}", str(wanted))


def _read_prompt(decoder: Decoder, folder: Path, settings, tensors) -> SoftPrompt:
    config = decoder.config
    _check_sizes(folder, settings, token_dim=config.embedding_dim, num_layers=config.num_layers)
    rows = _rows(folder, settings, tensors, config.embedding_dim)
    return SoftPrompt(jnp.asarray(rows, jnp.float32))


def _read_prefix(decoder: Decoder, folder: Path, settings, tensors) -> PrefixAdapter:
    config = decoder.config
    layers, heads, width = config.num_layers, config.num_kv_heads, config.head_dim
    _check_sizes(
        folder, settings, num_layers=layers, num_attention_heads=heads, token_dim=heads * width
    )
    flat = _rows(folder, settings, tensors, layers * 2 * heads * width)
    shape = (len(flat), layers, 2, heads, width)
    rows = jnp.moveaxis(jnp.asarray(flat, jnp.float32).reshape(shape), 0, 2)
    return PrefixAdapter(rows[:, 0], rows[:, 1])


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
    "LORA": PeftForm(LoraAdapter, lora_files, read_lora),
    "LN_TUNING": PeftForm(NormsAndBiases, norms_files, read_norms),
    # PEFT has no masked LoRA, and refuses a type that it does not know; as LORA it would read it,
    # and compute another function without a word.
    "MASKED_LORA": PeftForm(MaskedLora, lora_files, partial(read_lora, kind=MaskedLora)),
}
