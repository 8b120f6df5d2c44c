"""Adapters on disk, in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

A pool has no PEFT type: it is a folder with `pool.json` and one PROMPT_TUNING adapter per prompt,
each of which PEFT loads alone.
"""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from idp_jax.formats.names import NAMES
from idp_jax.jobs.folder import written_folder
from idp_jax.models.config import ModelConfig
from idp_jax.models.decoder import Decoder
from idp_jax.models.matrices import matrices
from idp_jax.recover.lora import LoraAdapter
from idp_jax.recover.pool import Pool
from idp_jax.recover.prefix import PrefixAdapter
from idp_jax.recover.prompt import SoftPrompt
from idp_jax.recover.repaired import Repaired
from idp_jax.recover.selectors import SELECTORS, selector

Adapter = SoftPrompt | PrefixAdapter | LoraAdapter | Pool


def save_adapter(
    adapter: Adapter, out: str | Path, *, decoder: Decoder, base: str = "", overwrite: bool = False
) -> Path:
    """Writes an adapter folder.

    Args:
        decoder: the model it belongs to.
        base: that model's path or name, for `base_model_name_or_path`.

    Raises:
        ValueError: `out` exists, or a pool's selector is not one of `SELECTORS`.
    """
    with written_folder(Path(out), overwrite=overwrite) as folder:
        if isinstance(adapter, Pool):
            _save_pool(adapter, folder, decoder, base)
        else:
            _save_single(adapter, folder, decoder, base)
    return Path(out)


def _save_pool(pool: Pool, folder: Path, decoder: Decoder, base: str) -> None:
    named = [name for name, function in SELECTORS.items() if function is pool.selector]
    if not named:
        raise ValueError(
            f"the pool's selector {pool.selector!r} has no name to save; add it to SELECTORS first"
        )
    names = [f"prompt_{i}_{length}_tokens" for i, length in enumerate(pool.lengths)]
    for name, prompt in zip(names, pool.prompts, strict=True):
        (folder / name).mkdir()
        _save_single(prompt, folder / name, decoder, base)
    settings = {
        "type": "IDP_POOL",
        "prompts": names,
        "lengths": pool.lengths,
        "selector": named[0],
        # Rotary models: every prompt ends where the input starts. Learned positions: as trained, 0
        # .. n - 1.
        "alignment": "right" if decoder.config.rope is not None else "own",
    }
    (folder / "pool.json").write_text(json.dumps(settings, indent=2))


def _save_single(adapter: Adapter, folder: Path, decoder: Decoder, base: str) -> None:
    from safetensors.numpy import save_file

    config = decoder.config
    common = {"task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True}
    if isinstance(adapter, LoraAdapter):
        settings, tensors = _lora_files(adapter, config)
    else:
        settings, tensors = _prompt_files(adapter, config)
    tensors = {name: np.ascontiguousarray(value, np.float32) for name, value in tensors.items()}
    (folder / "adapter_config.json").write_text(json.dumps({**common, **settings}, indent=2))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _prompt_files(adapter, config: ModelConfig) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    settings = {
        "num_layers": config.num_layers,
        "num_transformer_submodules": 1,
    }
    if isinstance(adapter, SoftPrompt):
        embeddings = np.asarray(adapter.embeddings[...])
        settings |= {
            "peft_type": "PROMPT_TUNING",
            "prompt_tuning_init": "RANDOM",
            "num_virtual_tokens": len(embeddings),
            "token_dim": config.embedding_dim,
            "num_attention_heads": config.num_heads,
        }
        return settings, {"prompt_embeddings": embeddings}
    k, v = np.asarray(adapter.k[...]), np.asarray(adapter.v[...])
    rows = np.stack([k, v], 1)  # [L, 2, P, K, H]: layer l has K in row 2l and V in row 2l + 1
    length = rows.shape[2]
    settings |= {
        "peft_type": "PREFIX_TUNING",
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
        "peft_type": "LORA",
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


def load_adapter(model: Decoder, folder: str | Path) -> Repaired:
    """Puts an adapter (PEFT's PROMPT_TUNING, PREFIX_TUNING or LORA, or a pool) beside a model.

    Returns:
        A model that is called in the same way; `model` itself is unchanged.

    Raises:
        ValueError: no adapter there, one of another kind, or one that was made for another model.
    """
    return read_adapter(model, folder).repair(model)


def read_adapter(decoder: Decoder, folder: str | Path) -> Adapter:
    """Reads an adapter folder for `decoder`; raises as `load_adapter`."""
    folder = Path(folder)
    if (folder / "pool.json").is_file():
        return _read_pool(decoder, folder)
    if not (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{folder} holds no adapter_config.json and no pool.json; give an adapter's folder"
        )
    settings, tensors = _read_json(folder / "adapter_config.json"), _read_tensors(folder)
    readers = {
        "PROMPT_TUNING": _read_prompt,
        "PREFIX_TUNING": _read_prefix,
        "LORA": _read_lora,
    }
    kind = settings.get("peft_type")
    if kind not in readers:
        raise ValueError(
            f"{folder}: peft_type {kind!r} is not supported; supported: {', '.join(readers)}"
        )
    try:
        return readers[kind](decoder, folder, settings, tensors)
    except KeyError as error:
        raise ValueError(f"{folder} lacks {error}; save the adapter again") from error


def _read_pool(decoder: Decoder, folder: Path) -> Pool:
    settings = _read_json(folder / "pool.json")
    missing = [name for name in ("prompts", "selector") if not settings.get(name)]
    if missing:
        raise ValueError(f"{folder / 'pool.json'} names no {missing[0]}; save the pool again")
    prompts = []
    for name in settings["prompts"]:
        prompt = read_adapter(decoder, folder / name)
        if not isinstance(prompt, SoftPrompt):
            raise ValueError(
                f"{folder / name} is not a PROMPT_TUNING adapter; a pool has no others"
            )
        prompts.append(prompt)
    return Pool(prompts, selector(settings["selector"]))


def _read_json(file: Path) -> dict[str, Any]:
    try:
        tree = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON ({error}); save the adapter again") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{file} holds no settings; save the adapter again")
    return tree


def _read_tensors(folder: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    file = folder / "adapter_model.safetensors"
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{file} is missing or damaged ({error}); save the adapter again"
        ) from error


def _other_model(folder: Path, found: str, wanted: str) -> ValueError:
    return ValueError(
        f"the adapter {folder} was made for another model: it has {found}, this model needs "
        f"{wanted}"
    )


def _read_prompt(decoder: Decoder, folder: Path, settings, tensors) -> SoftPrompt:
    embeddings = tensors["prompt_embeddings"]
    wanted = (settings["num_virtual_tokens"], decoder.config.embedding_dim)
    if embeddings.shape != wanted:
        raise _other_model(folder, f"prompt embeddings {embeddings.shape}", str(wanted))
    layers = settings.get("num_layers")
    if layers not in (None, decoder.config.num_layers):
        raise _other_model(folder, f"{layers} layers", str(decoder.config.num_layers))
    return SoftPrompt(jnp.asarray(embeddings, jnp.float32))


def _read_prefix(decoder: Decoder, folder: Path, settings, tensors) -> PrefixAdapter:
    if settings.get("prefix_projection"):
        raise ValueError(f"{folder}: prefix_projection is not supported; merge it with PEFT first")
    config, flat = decoder.config, tensors["prompt_embeddings"]
    width = config.num_layers * 2 * config.num_kv_heads * config.head_dim
    if flat.shape[1] != width:
        raise _other_model(folder, f"prefix rows of {flat.shape[1]}", str(width))
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
            raise _other_model(folder, f"{name} in {len(found)} layers", f"{len(modules)} layers")
        a[name] = np.stack([tensors[f"{m}.lora_A.weight"].T for m in modules])
        b[name] = np.stack([tensors[f"{m}.lora_B.weight"].T for m in modules])
        wanted = (matrix.inputs, matrix.outputs)
        if (a[name].shape[1], b[name].shape[2]) != wanted:
            raise _other_model(
                folder, f"{name} of {(a[name].shape[1], b[name].shape[2])}", str(wanted)
            )
        used += 2 * len(modules)
    if not a or used != len(tensors):
        raise _other_model(folder, f"{len(tensors)} LoRA tensors", f"{used} of them")
    rank = settings["r"]
    alpha = settings["lora_alpha"] * (rank**0.5 if settings.get("use_rslora") else 1.0)
    to_jax = lambda arrays: {
        name: jnp.asarray(value, jnp.float32) for name, value in arrays.items()
    }
    return LoraAdapter(to_jax(a), to_jax(b), alpha)
