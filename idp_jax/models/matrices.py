"""The matrices of a block: the one table that all who need their sizes, axes or order read.

Matrices of a stage read the same input, so that compression measures one Hessian for them all. The
invariant: no other file spells the list; `names.py` maps it to the names in files.
"""

from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from idp_jax.models.config import ModelConfig

# Name, logical axes of inputs and outputs (see `sharding.RULES`), and stage, in order of use.
_TABLE = (
    ("q", ("embed", "heads"), 0),
    ("k", ("embed", "kv_heads"), 0),
    ("v", ("embed", "kv_heads"), 0),
    ("o", ("heads", "embed"), 1),
    ("gate", ("embed", "ffw"), 2),
    ("up", ("embed", "ffw"), 2),
    ("down", ("ffw", "embed"), 3),
)
_ATTENTION_STAGES = (0, 1)


@dataclass(frozen=True)
class Matrix:
    """One matrix of a block, [I, O].

    Attributes:
        name: the attribute of `Block` that holds it.
        inputs: I.
        outputs: O.
        axes: logical axes of inputs and outputs.
        stage: which of a block's steps it belongs to, from 0.
        bias: whether it has one.
    """

    name: str
    inputs: int
    outputs: int
    axes: tuple[str, str]
    stage: int
    bias: bool

    @property
    def split(self) -> Literal["inputs", "outputs"]:
        """The side that tensor parallelism cuts: never that of the residual stream."""
        return "outputs" if self.axes[0] == "embed" else "inputs"


def matrices(config: ModelConfig) -> tuple[Matrix, ...]:
    """The matrices of every block of a model, in the order in which they are used."""
    sizes = {
        "embed": config.hidden_dim,
        "heads": config.num_heads * config.head_dim,
        "kv_heads": config.num_kv_heads * config.head_dim,
        "ffw": config.ffw_dim,
    }
    gated = config.architecture == "llama"
    return tuple(
        Matrix(
            name,
            inputs=sizes[axes[0]],
            outputs=sizes[axes[1]],
            axes=axes,
            stage=stage,
            bias=config.attention_bias if stage in _ATTENTION_STAGES else config.mlp_bias,
        )
        for name, axes, stage in _TABLE
        if gated or name != "gate"
    )


def stages(config: ModelConfig) -> tuple[tuple[Matrix, ...], ...]:
    """The matrices of a block, those that read the same input together."""
    grouped = groupby(matrices(config), lambda matrix: matrix.stage)
    return tuple(tuple(members) for _, members in grouped)


def matrix_axes(name: str) -> tuple[str, str]:
    """Logical axes of a matrix' inputs and outputs, which are the same in every model."""
    return next(axes for known, axes, _ in _TABLE if known == name)
