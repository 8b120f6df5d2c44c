"""Every setting of every command: frozen dataclasses, read from YAML files and from options.

`choices` lists the values that options may take, `groups` what several commands share, `commands`
and `experiment` hold the commands; `files` reads and writes them. The invariant: nothing here
imports jax.
"""

from idp_jax.config.commands import Compress, Convert, Evaluate, Train
from idp_jax.config.experiment import Demo, Experiment, Variant
from idp_jax.config.groups import (
    Calibration,
    Compression,
    ConfigError,
    Data,
    Loading,
    Lora,
    Measurement,
    Mesh,
    Optimizer,
    Timing,
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
    "Experiment",
    "Loading",
    "Lora",
    "Measurement",
    "Mesh",
    "Optimizer",
    "Timing",
    "Train",
    "Variant",
]
