"""Reading and writing models as others do: Hugging Face folders (plain, GPTQ, compressed-tensors)
and GGUF files.
"""

from idp_jax.formats.io import check_absent, load_model, load_tokenizer, save_model
from idp_jax.formats.source import CheckpointError, open_source, resolve

__all__ = [
    "CheckpointError",
    "check_absent",
    "load_model",
    "load_tokenizer",
    "open_source",
    "resolve",
    "save_model",
]
