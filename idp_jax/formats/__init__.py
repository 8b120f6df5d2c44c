"""Files that others read and write, and nothing else.

Hugging Face folders (plain, GPTQ, compressed-tensors), GGUF files, and PEFT adapters.
"""

from idp_jax.formats.adapters import load_adapter, save_adapter
from idp_jax.formats.load import default_dtype, load_model, load_tokenizer
from idp_jax.formats.source import CheckpointError, open_source, resolve
from idp_jax.formats.write import save_model

__all__ = [
    "CheckpointError",
    "default_dtype",
    "load_adapter",
    "load_model",
    "load_tokenizer",
    "open_source",
    "resolve",
    "save_adapter",
    "save_model",
]
