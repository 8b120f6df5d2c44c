"""Groups of settings, of which the commands of `config` are made, and what refuses a bad value.

A group knows no command: what several commands take is described and checked once, here. Users find
all of it under `config`.
"""

from dataclasses import dataclass
from typing import Any

METHODS = ("gptq", "rtn", "sparsegpt", "wanda", "magnitude")
GRIDS = ("mse", "minmax")
# Every method of repair and its learning rate where none is given; `recover.methods` trains them.
REPAIRS = {"prompt": 1e-3, "prefix": 1e-3, "lora": 1e-4, "idp": 1e-3}
ACT_ORDERS = ("group", "static", "none")
BITS = (2, 3, 4, 8)


class ConfigError(ValueError):
    """A setting that cannot be used: its name, its value and what to give instead."""


def one_of(name: str, value: Any, allowed: tuple) -> None:
    """Refuses a value of option `name` that is not among those allowed, by a ConfigError."""
    if value not in allowed:
        raise ConfigError(f"--{name} {value!r} is not one of {', '.join(map(str, allowed))}")


def at_least(name: str, value: float, minimum: float) -> None:
    """Refuses a number of option `name` that is too small, by a ConfigError."""
    if value < minimum:
        raise ConfigError(f"--{name} {value} must be at least {minimum}")


@dataclass(frozen=True)
class Compression:
    """How the matrices are compressed."""

    method: str = "gptq"
    """gptq or rtn (fewer bits); sparsegpt, wanda or magnitude (zeros)."""
    bits: int = 3
    """Bits per weight for gptq and rtn: 2, 3, 4 or 8."""
    group_size: int = 64
    """Inputs that share a scale and a zero; -1 for the whole row."""
    symmetric: bool = False
    """A grid symmetric about 0."""
    grid: str = "mse"
    """mse: the range of a group is searched for the least error; minmax: it reaches from the
    smallest to the largest weight."""
    act_order: str = "group"
    """The order in which gptq visits the columns. group: groups and the columns within them by the
    size of their inputs, largest first; static: all columns so, with grids from the original
    weights; none: as they lie. None of them costs anything at inference."""
    sparsity: str | None = None
    """A fraction of zeros such as 0.5, or n:m zeros such as 2:4. The default of sparsegpt, wanda
    and magnitude is 0.5; with gptq and rtn, zeros and fewer bits are made in one pass."""
    damping: float = 0.01
    """Added to the Hessian's diagonal, as a fraction of its mean."""
    block_size: int | None = None
    """Columns between two lazy updates (gptq, default 32: a matter of speed and rounding alone), or
    that share a threshold (sparsegpt, default 128)."""
    rules: tuple[str, ...] = ()
    """Other settings for some matrices: "REGEX SETTING=VALUE ...", or "REGEX skip", such as
    "layers\\.0\\. bits=4 group_size=32". The regex is searched for in the matrix' name in the
    checkpoint; the first rule that matches counts."""
    allow_worse: tuple[str, ...] = ()
    """Regexes of matrices that may end worse than plain rounding or magnitude pruning leaves
    them."""

    def __post_init__(self):
        one_of("method", self.method, METHODS)
        one_of("bits", self.bits, BITS)
        one_of("grid", self.grid, GRIDS)
        one_of("act-order", self.act_order, ACT_ORDERS)
        if self.group_size != -1:
            at_least("group-size", self.group_size, 1)
        at_least("block-size", self.columns, 1)
        at_least("damping", self.damping, 0)
        self.target()

    @property
    def quantizes(self) -> bool:
        """Whether the matrices get fewer bits."""
        return self.method in ("gptq", "rtn")

    @property
    def prunes(self) -> bool:
        """Whether the matrices get zeros."""
        return not self.quantizes or self.sparsity is not None

    @property
    def columns(self) -> int:
        """The block size, given or the method's default."""
        default = 128 if self.prunes else 32
        return default if self.block_size is None else self.block_size

    @property
    def needs_data(self) -> bool:
        """Whether calibration text is used."""
        return self.method in ("gptq", "sparsegpt", "wanda")

    def target(self) -> dict[str, Any]:
        """`sparsity` as the cores take it: {"sparsity": 0.5}, {"pattern": (2, 4)}, or {} for none.

        Raises:
            ConfigError: it is neither.
        """
        if not self.prunes:
            return {}
        text = str(self.sparsity or 0.5)
        try:
            if ":" in text:
                zeros, run = map(int, text.split(":"))
                if not 0 < zeros < run:
                    raise ValueError
                return {"pattern": (zeros, run)}
            fraction = float(text)
            if not 0 <= fraction < 1:
                raise ValueError
            return {"sparsity": fraction}
        except ValueError:
            raise ConfigError(
                f"--sparsity {text!r} is neither a fraction in [0, 1) such as 0.5 nor n:m zeros "
                "such as 2:4"
            ) from None


@dataclass(frozen=True)
class Calibration:
    """The text that Hessians are measured on."""

    calibration: str = "self"
    """self (text sampled from the model itself), a .txt or .jsonl file, or hub:NAME[:CONFIG]."""
    samples: int = 128
    """Windows of text."""
    sequence_length: int = 2048
    """Tokens of a window."""
    order: str = "first"
    """first: the first windows of the text; random: windows drawn by the seed."""
    batch_size: int = 2
    """Windows that go through the model at a time, on each device that the text is cut over."""

    def __post_init__(self):
        at_least("samples", self.samples, 1)
        at_least("sequence-length", self.sequence_length, 2)
        at_least("batch-size", self.batch_size, 1)
        one_of("order", self.order, ("first", "random"))


@dataclass(frozen=True)
class Mesh:
    """How the devices are arranged; all 1 uses one device, and one axis may be -1 (all that are
    left).
    """

    data: int = 1
    """Copies of the model; the batch is cut over them."""
    fsdp: int = 1
    """Devices that share parameters and batch."""
    model: int = 1
    """Devices that share every matrix."""
    distributed: bool = False
    """Join the other processes of this job first (jax.distributed; its settings are detected)."""


@dataclass(frozen=True)
class Optimizer:
    """AdamW with linear warm-up and linear decay."""

    learning_rate: float | None = None
    """Default by method: 1e-3 for prompts and prefixes, 1e-4 for LoRA."""
    warmup: float = 0.05
    """Fraction of the steps."""
    clip_norm: float = 1.0
    """Largest norm of the gradient."""
    weight_decay: float = 0.0

    def __post_init__(self):
        if self.learning_rate is not None and self.learning_rate <= 0:
            raise ConfigError(f"--optimizer.learning-rate {self.learning_rate} must be above 0")
        if not 0 <= self.warmup <= 1:
            raise ConfigError(f"--optimizer.warmup {self.warmup} must lie between 0 and 1")
        if self.clip_norm <= 0:
            raise ConfigError(f"--optimizer.clip-norm {self.clip_norm} must be above 0")


@dataclass(frozen=True)
class Lora:
    """Low-rank updates."""

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("q", "v")
    """Matrices of every block: q k v o gate up down."""

    def __post_init__(self):
        at_least("lora.rank", self.rank, 1)
        if not self.targets:
            raise ConfigError("--lora.targets must name at least one matrix, such as q")


@dataclass(frozen=True)
class Data:
    """Training and validation text, packed into windows without gaps."""

    train: str = "self"
    """self (text sampled from the model named by `teacher`), a .txt or .jsonl file, or
    hub:NAME[:CONFIG].
    """
    validation: str | None = None
    """The same kinds; by default the last windows of the training text are held out."""
    validation_windows: int = 32
    sequence_length: int = 1024
    teacher: str | None = None
    """For `self`: the uncompressed model that writes the text; by default the model itself."""

    def __post_init__(self):
        at_least("data.sequence-length", self.sequence_length, 2)
        at_least("data.validation-windows", self.validation_windows, 1)
