"""Every setting of every command: frozen dataclasses, read from YAML files and from options.

`choices` lists the values that options may take, `groups` what several commands share, `recovery`
what training takes; `commands` and `experiment` hold the commands; `files` reads and writes them.
The invariant: nothing here imports jax.
"""

from idp_jax.config.commands import Compress, Convert, Evaluate, PoolStudy, Train
from idp_jax.config.experiment import Demo, Experiment, Variant
from idp_jax.config.groups import (
    Calibration,
    Compression,
    ConfigError,
    Loading,
    Measurement,
    Mesh,
    Scoring,
    Timing,
)
from idp_jax.config.recovery import (
    Data,
    Init,
    Lora,
    Optimizer,
    Pool,
    Prefix,
    Teacher,
    Tracking,
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
    "Init",
    "Loading",
    "Lora",
    "Measurement",
    "Mesh",
    "Optimizer",
    "Pool",
    "PoolStudy",
    "Prefix",
    "Scoring",
    "Teacher",
    "Timing",
    "Tracking",
    "Train",
    "Variant",
]
