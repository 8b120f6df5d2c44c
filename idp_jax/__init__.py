"""Compress language models, repair them with prompts, and measure what came back.

from idp_jax import load_model, load_adapter
model = load_model("meta-llama/Llama-2-7b-hf")   # a hub name, a folder, a GGUF file or a
compressed folder
logits = model(input_ids)                        # float32 [B, T, V]
repaired = load_adapter(model, "runs/prompt")    # same call, repaired
"""

__version__ = "0.1.0"

_EXPORTS = {
    "load_model": "idp_jax.formats",
    "load_tokenizer": "idp_jax.formats",
    "save_model": "idp_jax.formats",
    "load_adapter": "idp_jax.formats",
    "save_adapter": "idp_jax.formats",
}
__all__ = sorted(_EXPORTS)


def __getattr__(name: str):
    """Imports the public names on first use, so that `idp-jax --help` does not wait for jax."""
    if name in _EXPORTS:
        from importlib import import_module

        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'idp_jax' has no attribute {name!r}")
