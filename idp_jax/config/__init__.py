"""Every setting of every command: frozen dataclasses, read from YAML files and from options.

`choices` lists the values that options may take, `groups` what several commands share, `recovery`
what training takes; `commands`, `bench`, `comparison`, `generation`, `experiment`, `reproduce` and
`sweep` hold the commands; `files` reads and writes them. The invariant: nothing here imports jax.
"""

from idp_jax.config.bench import Bench
from idp_jax.config.commands import Compress, Convert, Evaluate, Merge, Plan, PoolStudy, Train
from idp_jax.config.comparison import Compare
from idp_jax.config.corpora import Corpora
from idp_jax.config.experiment import Demo, Experiment, Variant
from idp_jax.config.generation import Generate
from idp_jax.config.groups import (
    Calibration,
    Compression,
    ConfigError,
    Loading,
    Measurement,
    Mesh,
    Scoring,
    Timing,
    refuse_url,
    url_of,
)
from idp_jax.config.recovery import (
    Data,
    Init,
    Lora,
    Norms,
    Optimizer,
    Pool,
    Prefix,
    Teacher,
    Tracking,
)
from idp_jax.config.reproduce import Reproduce
from idp_jax.config.sweep import Sweep

__all__ = [
    "Bench",
    "Calibration",
    "Compare",
    "Compress",
    "Compression",
    "ConfigError",
    "Convert",
    "Corpora",
    "Data",
    "Demo",
    "Evaluate",
    "Experiment",
    "Generate",
    "Init",
    "Loading",
    "Lora",
    "Measurement",
    "Merge",
    "Mesh",
    "Norms",
    "Optimizer",
    "Plan",
    "Pool",
    "PoolStudy",
    "Prefix",
    "Reproduce",
    "Scoring",
    "Sweep",
    "Teacher",
    "Timing",
    "Tracking",
    "Train",
    "Variant",
    "refuse_url",
    "url_of",
]
