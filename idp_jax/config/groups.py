"""Groups of settings, of which the commands are made, and what refuses a bad value.

A group knows no command: what several commands take is described and checked once, here. Every
setting has one line of help.
"""

import math
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args, get_origin

import yaml

from idp_jax.config.choices import (
    ActOrder,
    Algorithm,
    Bits,
    Dtype,
    Grid,
    Kernel,
    TextOrder,
    Weights,
)


class ConfigError(ValueError):
    """A setting that cannot be used: its name, its value and what to give instead."""


def at_least(name: str, value: float, minimum: float) -> None:
    """Refuses a number of option `name` that is too small, by a ConfigError."""
    if value < minimum:
        raise ConfigError(f"--{name} {value} must be at least {minimum}")


def one_of(name: str, value: Any, allowed: tuple) -> None:
    """Refuses a value of option `name` that is not among those allowed, by a ConfigError."""
    if value not in allowed:
        raise ConfigError(f"--{name} {value!r} is not one of {', '.join(map(str, allowed))}")


_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(//|/(?!/))")  # a `Path` keeps one of the slashes


def url_of(value: Any) -> str | None:
    """The URL that a text or a path is, or None."""
    given = _URL.match(str(value)) if isinstance(value, str | Path) else None
    if given is None or (isinstance(value, str) and given[2] != "//"):
        return None
    root = "/" if given[1] == "file" and isinstance(value, Path) else ""
    return f"{given[1]}://{root}{str(value)[given.end() :]}"


def refuse_url(name: str, value: Any) -> None:
    """Refuses a URL where a file or folder is asked for: it would name a local folder in silence.

    Args:
        name: of the option, or of what else the value is.
        value: a text, a path, or some of them.

    Raises:
        ConfigError: it is one.
    """
    for given in map(url_of, value if isinstance(value, tuple) else (value,)):
        if given is not None:
            raise ConfigError(
                f"{name} {given} is a URL, and only files and folders are taken; mount the bucket "
                "(gcsfuse, s3fs) and give its place there"
            )


class Settings:
    """The base of all groups: unknown keys are refused, and so are values that are none."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}
    section: ClassVar[str] = ""  # what stands before the options of a group inside another
    words: ClassVar[tuple[str, ...]] = ()  # settings that name no file or folder, whatever they say
    urls: ClassVar[tuple[str, ...]] = ()  # settings that may be URLs, see `jobs.remote`
    writes: ClassVar[Literal["folder", "file"] | None] = None  # what `out` is, copied to its URL

    def __post_init__(self):
        for entry in fields(self):  # type: ignore[arg-type]  # every group is a dataclass
            option, value = entry.name.replace("_", "-"), getattr(self, entry.name)
            if get_origin(entry.type) is Literal:
                one_of(option, value, get_args(entry.type))
            if entry.name not in self.words + self.urls:
                refuse_url(f"--{self.section}{option}", value)
            if isinstance(value, float) and math.isnan(value):
                raise ConfigError(f"--{option} {value} is no number")
            if entry.name == "seed" and not 0 <= value < 2**32:  # numpy and torch take no other
                raise ConfigError(f"--seed {value} must lie between 0 and {2**32 - 1}")


@dataclass(frozen=True)
class Compression(Settings):
    """How the matrices are compressed."""

    method: Algorithm = "gptq"
    """gptq and rtn leave fewer bits; sparsegpt, wanda and magnitude make zeros."""
    bits: Bits = 3
    """Bits of a weight, for gptq and rtn."""
    group_size: int = 64
    """Inputs that share a scale and a zero; -1 for the whole row."""
    symmetric: bool = False
    """A grid symmetric about 0."""
    grid: Grid = "mse"
    """A group's range: searched for the least error, or from its smallest to its largest weight."""
    act_order: ActOrder = "group"
    """Columns by the size of their inputs: groups and within them, across groups, or not at all."""
    sparsity: str | None = None
    """Zeros: a fraction such as 0.5 (the default where zeros are made), or n:m such as 2:4."""
    damping: float = 0.01
    """Added to the Hessian's diagonal, as a fraction of its mean."""
    block_size: int | None = None
    """Columns between lazy updates (gptq: 32), or that share a threshold (sparsegpt: 128)."""
    rules: tuple[str, ...] = ()
    """Settings by matrix: "REGEX SETTING=VALUE ..." or "REGEX skip"; the first match counts."""
    allow_worse: tuple[str, ...] = ()
    """Regexes of matrices that may end worse than plain rounding or magnitude pruning."""

    def __post_init__(self):
        super().__post_init__()
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
    def summary(self) -> str:
        """Method and size in a few words."""
        if not self.quantizes:
            return f"{self.method} {self.sparsity or 0.5} zeros"
        return f"{self.method} {self.bits} bit group {self.group_size}"

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
class Calibration(Settings):
    """The text that Hessians are measured on."""

    calibration: str = "self"
    """self (text sampled from the model itself), a .txt or .jsonl file, or hub:NAME[:CONFIG]."""
    samples: int = 128
    """Windows of text."""
    sequence_length: int = 2048
    """Tokens of a window."""
    order: TextOrder = "first"
    """Which windows: the first of the text, or some drawn by the seed."""
    batch_size: int = 2
    """Windows that go through the model at a time, on each device that the text is cut over."""

    def __post_init__(self):
        super().__post_init__()
        at_least("samples", self.samples, 1)
        at_least("sequence-length", self.sequence_length, 2)
        at_least("batch-size", self.batch_size, 1)


@dataclass(frozen=True)
class Mesh(Settings):
    """How the devices are arranged: all 1 uses one, and one axis may be -1 (all that are left)."""

    data: int = 1
    """Copies of the model; the batch is cut over them."""
    fsdp: int = 1
    """Devices that share parameters and batch."""
    model: int = 1
    """Devices that share every matrix."""
    distributed: bool = False
    """Join the other processes of this job first (jax.distributed detects its settings)."""


@dataclass(frozen=True, kw_only=True)
class Loading(Settings):
    """Which model is loaded, and how it is held."""

    urls: ClassVar[tuple[str, ...]] = ("model",)

    model: str
    """Hub name, model folder, GGUF file or compressed folder."""
    weights: Weights = "auto"
    """Packed matrices stay packed or are expanded once; auto expands on a CPU that has the room."""
    kernel: Kernel = "auto"
    """What multiplies by packed and 2:4 matrices; auto is the best that the machine has."""
    dtype: Dtype | None = None
    """Of activations and dense weights: by default float32 on a CPU, bfloat16 on accelerators; auto
    keeps the checkpoint's."""
    mesh: Mesh = field(default_factory=Mesh)

    @property
    def held(self) -> dict[str, Any]:
        """How a model is held, as `load_model` takes it."""
        return {"dtype": self.dtype, "weights": self.weights, "kernel": self.kernel}


@dataclass(frozen=True)
class Timing(Settings):
    """How latency is measured: greedy generation from random prompts."""

    batch_size: int = 1
    """Rows generated together."""
    prompt_length: int = 128
    """Tokens of a prompt; a soft prompt comes on top."""
    new_tokens: int = 32
    """Tokens generated for each row."""
    repeats: int = 5
    """Timed runs, of which the median is given."""

    def __post_init__(self):
        super().__post_init__()
        for entry in fields(self):
            at_least(f"timing.{entry.name.replace('_', '-')}", getattr(self, entry.name), 1)


@dataclass(frozen=True, kw_only=True)
class Scoring(Settings):
    """The questions and the text that a model is scored on."""

    tasks: str = ""
    """lm-eval tasks, separated by commas; `knowledge` is the built-in probe."""
    task_data: Path | None = None
    """Folder with a local copy of every task's data, TASK/{train,validation,test}.jsonl[.gz]."""
    include_path: Path | None = None
    """Folder of further task files, as lm-eval's --include_path."""
    limit: int | float | None = None
    """Items of each task, or the fraction of them where it is below 1."""
    num_fewshot: int | None = None
    """Examples before each item; by default what the task says."""
    perplexity: Path | None = None
    """A .txt, .raw or .jsonl file."""
    sequence_length: int = 2048
    """Tokens of a perplexity window."""
    windows: int | None = None
    """Perplexity windows; by default all that the text gives."""
    batch_size: int = 8
    """Rows that go through the model at a time; it does not change the results."""
    max_length: int | None = None
    """Longest input in tokens; by default what the model allows."""
    seed: int = 0
    """Of few-shot examples, sampled answers and resampled intervals."""

    def __post_init__(self):
        super().__post_init__()
        at_least("batch-size", self.batch_size, 1)
        at_least("sequence-length", self.sequence_length, 2)
        if self.limit is not None and not (0 < self.limit < 1 or self.limit in range(1, 2**63)):
            raise ConfigError(
                f"--limit {self.limit} must be a whole number of items, or a fraction of them "
                "between 0 and 1"
            )
        if self.windows is not None:
            at_least("windows", self.windows, 1)
        if self.include_path is not None and not self.include_path.is_dir():
            raise ConfigError(f"--include-path {self.include_path} is no folder of task files")

    @property
    def task_names(self) -> list[str]:
        """The tasks as a list."""
        return [name.strip() for name in self.tasks.split(",") if name.strip()]


@dataclass(frozen=True, kw_only=True)
class Measurement(Scoring):
    """What of a model is measured, and how."""

    latency: bool = False
    """Measure the time of prefill and decoding, too."""
    timing: Timing = field(default_factory=Timing)
    gen_kwargs: str = ""
    """Options of generated answers over those of the tasks: do_sample=true,temperature=0.7, or a
    JSON object."""
    log_samples: Path | None = None
    """Folder for lm-eval's own files, too: results_*.json, and samples_*.jsonl with every item."""

    def __post_init__(self):
        super().__post_init__()
        self.generation  # noqa: B018  # refuses what it cannot read
        if self.log_samples is not None and self.log_samples.is_file():
            raise ConfigError(f"--log-samples {self.log_samples} is a file; give a folder")
        if not self.task_names and self.perplexity is None and not self.latency:
            raise ConfigError("nothing to evaluate: give --tasks, --perplexity or --latency")

    @property
    def generation(self) -> dict[str, Any] | None:
        """The options of `gen_kwargs` by name; None where there are none.

        Raises:
            ConfigError: they are neither KEY=VALUE,... nor a JSON object.
        """
        if not self.gen_kwargs:
            return None
        text = re.sub(r"(^|,)\s*(\w+)=", r"\1 \2: ", self.gen_kwargs)
        try:  # JSON is YAML, and so are the values that stand alone
            found = yaml.safe_load(text if text.lstrip().startswith("{") else f"{{{text}}}")
        except (yaml.YAMLError, RecursionError):
            found = None
        if not isinstance(found, dict) or None in found.values():
            raise ConfigError(
                f"--gen-kwargs {self.gen_kwargs} is neither KEY=VALUE,... nor a JSON object; give "
                "do_sample=true,temperature=0.7, say"
            )
        return found
