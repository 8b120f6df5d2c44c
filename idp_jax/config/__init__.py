"""Every setting of every command: frozen dataclasses, read from YAML files and from options.

An unknown key or a value out of range is an error of one line. No number is defaulted here that the
model's own config.json supplies.
"""

from idp_jax.config.commands import Compress, Convert, Demo, Evaluate, Train
from idp_jax.config.groups import (
    Calibration,
    Compression,
    ConfigError,
    Data,
    Lora,
    Mesh,
    Optimizer,
)

__all__ = [
    "Calibration",
    "Compress",
    "Compression",
    "ConfigError",
    "Convert",
    "Data",
    "Demo",
    "Evaluate",
    "Lora",
    "Mesh",
    "Optimizer",
    "Train",
]
