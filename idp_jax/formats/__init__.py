"""Files that others read and write too: Hugging Face folders, GGUF files, and PEFT adapters."""

from idp_jax.formats.load import load_model, load_tokenizer
from idp_jax.formats.peft import load_adapter, save_adapter
from idp_jax.formats.source import CheckpointError, open_source, resolve
from idp_jax.formats.write import save_model

__all__ = [
    "CheckpointError",
    "load_adapter",
    "load_model",
    "load_tokenizer",
    "open_source",
    "resolve",
    "save_adapter",
    "save_model",
]
