"""Compress language models, repair them with prompts, and measure what came back.

import idp_jax

model = idp_jax.load_model("meta-llama/Llama-2-7b-hf")  # hub name, folder, GGUF, compressed
tokenizer = idp_jax.load_tokenizer("meta-llama/Llama-2-7b-hf")
logits = model(tokenizer("Once", return_tensors="np"))  # float32 [B, T, V]
repaired = idp_jax.load_adapter(model, "runs/prompt")   # called likewise
idp_jax.generate(repaired, "Once", tokenizer=tokenizer, max_new_tokens=8)
"""

from importlib import import_module

__version__ = "0.3.0"

# What users reach for, and where it stands.
_EXPORTS = {
    "load_model": "idp_jax.formats",
    "load_tokenizer": "idp_jax.formats",
    "save_model": "idp_jax.formats",
    "load_adapter": "idp_jax.formats",
    "save_adapter": "idp_jax.formats",
    "compress": "idp_jax.compression.job",
    "train": "idp_jax.training",
    "generate": "idp_jax.inference",
    "evaluate": "idp_jax.evaluation",
    "perplexity": "idp_jax.evaluation.perplexity",
    "latency": "idp_jax.evaluation.latency",
    "compare": "idp_jax.evaluation",
}
__all__ = sorted(_EXPORTS)


def __getattr__(name: str):
    """Imports the public names on first use, so that `idp-jax --help` does not wait for jax."""
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'idp_jax' has no attribute {name!r}")
