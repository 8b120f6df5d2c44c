"""The settings of every command: frozen dataclasses, made of the groups of `groups`.

No number is defaulted here that the model's own config.json supplies.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from idp_jax.config.choices import (
    LEARNING_RATES,
    Dtype,
    Form,
    PackedForm,
    PrunedForm,
    Remat,
    Repair,
)
from idp_jax.config.groups import (
    Calibration,
    Compression,
    ConfigError,
    Loading,
    Measurement,
    Mesh,
    Scoring,
    Settings,
    at_least,
    one_of,
)
from idp_jax.config.marks import Positional
from idp_jax.config.places import check_apart, check_not_working
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

_TEXTS = ("train", "validation")  # of `Data`, what training reads


@dataclass(frozen=True, kw_only=True)
class Train(Loading):
    """Train a prompt, prefix, LoRA, norms or IDP pool beside a model."""

    has_presets: ClassVar[bool] = True  # of `config.presets`
    urls: ClassVar[tuple[str, ...]] = ("model", "out")

    out: Path
    """Folder of the run, or a URL: checkpoints, metrics.jsonl, config.yaml, at the end adapter/."""
    method: Repair = "prompt"
    """What is trained; idp is a pool of prompts, trained one after the other."""
    prompt_length: int = 50
    """Tokens of a prompt or prefix."""
    pool_lengths: tuple[int, ...] = (25, 100)
    """Tokens of each prompt of a pool."""
    selector: str = "mean_attention"
    """How the pool's prompt is chosen: a built-in name (mean_attention, random, ...), or a function
    of your own as package.module:name or file.py:name."""
    objective: str = "ce"
    """What is made smaller: ce, kl, hidden_mse, cka, file.py:name, or a sum as "kl + 0.5*ce"."""
    teacher: Teacher = field(default_factory=Teacher)
    init: Init = field(default_factory=Init)
    prefix: Prefix = field(default_factory=Prefix)
    lora: Lora = field(default_factory=Lora)
    norms: Norms = field(default_factory=Norms)
    pool: Pool = field(default_factory=Pool)
    tokens: int = 40_960_000
    """Training budget in tokens (for each prompt of a pool); 0 keeps the start as it is."""
    batch_size: int = 2
    """Windows of a step."""
    passes: int = 1
    """In which a step's windows go through the model: more need less memory, and more time."""
    data: Data = field(default_factory=Data)
    optimizer: Optimizer = field(default_factory=Optimizer)
    evaluate_every: int = 200
    """Steps between two validations; the best adapter is kept."""
    checkpoint_every: int = 100
    """Steps between two checkpoints, from which a killed run goes on."""
    keep_checkpoints: int = 1
    """Checkpoints that are kept, the last ones; each holds the best adapter, too."""
    patience: int | None = None
    """Validations without a better adapter after which training stops; by default it never does."""
    plan: bool = False
    """Print the memory and the time that the run would take here, and stop."""
    profile: int = 0
    """Steps, behind the first two, whose trace is written to OUT/profile."""
    tracking: Tracking = field(default_factory=Tracking)
    remat: Remat | None = None
    """What the backward pass makes again: none of the activations; all but the results of matrices
    (dots; default on a CPU); a layer from its input (layer; on accelerators): less memory, a third
    more time."""
    seed: int = 0
    """Of initial values, the order of windows and sampled text."""

    def __post_init__(self):
        super().__post_init__()
        read = {f"data.{name}": getattr(self.data, name) for name in _TEXTS}
        read |= {"teacher.model": self.teacher.model, "teacher.cache": self.teacher.cache}
        read |= {"init.file": self.init.file}
        self._check_places({"model": self.model, **read})
        at_least("batch-size", self.batch_size, 1)
        at_least("passes", self.passes, 1)
        if self.batch_size % self.passes:
            raise ConfigError(
                f"--batch-size {self.batch_size} does not divide into --passes {self.passes}; "
                "choose a multiple of it"
            )
        at_least("evaluate-every", self.evaluate_every, 1)
        at_least("checkpoint-every", self.checkpoint_every, 1)
        at_least("keep-checkpoints", self.keep_checkpoints, 1)
        at_least("profile", self.profile, 0)
        at_least("prompt-length", self.prompt_length, 1)
        if len(self.pool_lengths) < 1 or min(self.pool_lengths) < 1:
            raise ConfigError(
                f"--pool-lengths {self.pool_lengths} must name at least one length above 0"
            )
        together = self.method == "idp" and self.pool.training == "joint"
        if together and self.data.documents == "apart":
            raise ConfigError(
                "--data.documents apart goes with no joint training: a prompt is chosen for a "
                "whole window, not for each document in it; give joined"
            )
        window = self.batch_size * self.data.sequence_length
        if self.tokens < 0 or 0 < self.tokens < window:
            raise ConfigError(
                f"--tokens {self.tokens} is less than one step of {window} tokens; 0 trains nothing"
            )
        if self.patience is not None:
            at_least("patience", self.patience, 1)
        self._check_start()

    def _check_places(self, read: dict[str, Any]) -> None:
        """Refuses a result that would lie in what is read."""
        check_apart(self.out, read)

    @property
    def starts_from_teacher(self) -> bool:
        """Whether the start is made with the uncompressed model."""
        return self.init.model == "teacher" or self._is_eora

    @property
    def _is_eora(self) -> bool:
        return self.method == "lora" and self.lora.start == "eora"

    def _check_start(self) -> None:
        """Refuses a start that the method does not have."""
        if self._is_eora and self.teacher.model is None:
            raise ConfigError("--lora.start eora needs the uncompressed model: --teacher.model")
        of_prefixes = self.method == "idp" and self.pool.of == "prefixes"
        if self.init.model == "teacher" and self.method != "prefix" and not of_prefixes:
            raise ConfigError(
                f"--init.model teacher is a start of --method prefix; {self.method} has no keys "
                "and values"
            )
        if self.init.model == "teacher" and self.teacher.model is None:
            raise ConfigError("--init.model teacher needs --teacher.model, the uncompressed model")
        if self.prefix != Prefix() and self.method != "prefix":
            raise ConfigError(f"--prefix.* are settings of --method prefix, not of {self.method}")
        if self.method == "idp":
            shortest = min(self.pool_lengths)
        else:
            shortest = max(self.prefix.lengths or (self.prompt_length,))
        frozen = self.init.frozen_tokens
        if frozen > shortest or (frozen == shortest and self.tokens):
            raise ConfigError(
                f"--init.frozen-tokens {frozen} leaves nothing of {shortest} tokens to train; give "
                "fewer, or --tokens 0"
            )

    @property
    def steps(self) -> int:
        """Optimiser steps that the token budget pays for."""
        return self.tokens // (self.batch_size * self.data.sequence_length)

    @property
    def windows_at_once(self) -> int:
        """Windows that go through the model together."""
        return self.batch_size // self.passes

    @property
    def learning_rate(self) -> float:
        """The given learning rate, or the method's default."""
        return self.optimizer.learning_rate or LEARNING_RATES[self.method]


@dataclass(frozen=True, kw_only=True)
class Plan(Train):
    """Compile a training for devices that are not here: memory and time.

    idp-jax plan FILE.yaml --topology v5e:16x16, where the file is a training's.
    """

    takes_file: ClassVar[bool] = True  # a first argument that is no option is --config_path

    topology: str
    """Kind and shape of the devices: v4, v5e, v5p or v6e as in v5e:16x16; h100:8, or h100:4x8 for
    four hosts of eight."""
    bits: int | None = None
    """Plan as if the matrices were packed to 2, 3, 4 or 8 bits; by default as the model is."""
    group_size: int = 128
    """Inputs that share a scale, with --bits; -1 for all of a column's."""
    programs: str = ""
    """Only programs whose name begins so: step, validation, loading, prefill, decode."""
    out: Path = Path("runs/planned")
    """Of the training; nothing is written there."""

    def __post_init__(self):
        super().__post_init__()
        if self.bits is not None:
            one_of("bits", self.bits, (2, 3, 4, 8))
            if self.weights == "dense":
                raise ConfigError("--weights dense writes matrices out; leave out it or --bits")
        if self.group_size != -1:
            at_least("group-size", self.group_size, 1)

    def _check_places(self, read: dict[str, Any]) -> None:
        """Nothing is written."""


@dataclass(frozen=True, kw_only=True)
class Compress(Compression, Calibration):
    """Compress a model, block by block: fewer bits, zeros, or both.

    Killed and started again, it goes on from the last finished block.
    """

    urls: ClassVar[tuple[str, ...]] = ("model", "calibration", "out")
    writes: ClassVar[Literal["folder", "file"] | None] = "folder"

    model: Positional[str]
    """Hub name, model folder or GGUF file; for --plan a folder with a config.json is enough."""
    out: Path | None = None
    """Folder of the model, or a URL; the work lies in OUT.partial until it is complete."""
    format: Literal["auto", Form] = "auto"
    """How matrices are stored; auto is gptq_v2 for fewer bits, dense for zeros alone."""
    plan: bool = False
    """Print the memory and the time that the run would take here, and stop."""
    overwrite: bool = False
    """Replace `out` if this software wrote it."""
    dtype: Dtype = "float32"
    """Of the calibration pass; what is not packed keeps the checkpoint's own."""
    seed: int = 0
    """Of sampled text and randomly drawn windows."""
    mesh: Mesh = field(default_factory=Mesh)
    """Calibration text is cut over data, the rows of the matrices over model."""

    def __post_init__(self):
        super().__post_init__()
        check_apart(self.out, {"model": self.model, "calibration": self.calibration})
        check_not_working(self.out)
        forms = get_args(PackedForm if self.quantizes else PrunedForm)
        one_of("format", self.format, ("auto", *forms))

    @property
    def form(self) -> str:
        """The storage form, given or the method's default."""
        default = "gptq_v2" if self.quantizes else "dense"
        return default if self.format == "auto" else self.format


@dataclass(frozen=True, kw_only=True)
class Convert(Settings):
    """Write a model in another storage form; its numbers stay."""

    urls: ClassVar[tuple[str, ...]] = ("model", "out")
    writes: ClassVar[Literal["folder", "file"] | None] = "folder"

    model: Positional[str]
    """Hub name, model folder, GGUF file or compressed folder."""
    out: Path
    """Folder of the converted model, or a URL."""
    to: Form
    """gptq, gptq_v2 and pack-quantized hold packed models, sparse-* pruned ones, dense any."""
    overwrite: bool = False
    """Replace `out` if this software wrote it."""
    dtype: Dtype = "auto"
    """Of what is not packed; packed matrices written out as dense are exact in float32."""

    def __post_init__(self):
        super().__post_init__()
        check_apart(self.out, {"model": self.model})
        check_not_working(self.out)


@dataclass(frozen=True, kw_only=True)
class Merge(Settings):
    """Write a LoRA, or norms and biases, into the model beside it."""

    urls: ClassVar[tuple[str, ...]] = ("model", "out")
    writes: ClassVar[Literal["folder", "file"] | None] = "folder"

    model: Positional[str]
    """Hub name, model folder or GGUF file; dense or pruned."""
    adapter: Path
    """Folder of the adapter."""
    out: Path
    """Folder of the merged model, or a URL."""
    dense: bool = False
    """Merge a plain LoRA into a pruned model, which loses its zeros."""
    overwrite: bool = False
    """Replace `out` if this software wrote it."""
    dtype: Dtype = "auto"
    """Of the merged model; small updates may be lost in the checkpoint's own 16 bits."""

    def __post_init__(self):
        super().__post_init__()
        check_apart(self.out, {"model": self.model, "adapter": self.adapter})
        check_not_working(self.out)


@dataclass(frozen=True, kw_only=True)
class Evaluate(Measurement, Loading):
    """Score a model and its repairs: harness tasks, perplexity, latency."""

    urls: ClassVar[tuple[str, ...]] = ("model", "out")
    writes: ClassVar[Literal["folder", "file"] | None] = "file"

    out: Path
    """The results, a JSON file, or a URL."""
    overwrite: bool = False
    """Replace `out` if it holds results."""
    adapter: Path | None = None
    """Folder of a PEFT adapter or of a pool."""
    selector: tuple[str, ...] = ()
    """How the pool's prompt is chosen instead of the pool's own way; several give one row each."""

    def __post_init__(self):
        super().__post_init__()
        read = {"model": self.model, "adapter": self.adapter}
        text = {"text": self.perplexity, "task-data": self.task_data}
        check_apart(self.out, read | text)
        if self.selector and self.adapter is None:
            raise ConfigError(f"--selector {self.selector[0]} needs a pool: give its --adapter")
        if len(set(self.selector)) < len(self.selector):
            raise ConfigError(f"--selector names one twice: {' '.join(self.selector)}")


@dataclass(frozen=True, kw_only=True)
class PoolStudy(Scoring, Loading):
    """Ask whether choosing a prompt for every input helps.

    Selectors are held against a random prompt, the best fixed one and the oracle.

    The oracle is held against noise; docs/selectors.md says what the columns mean.

    A fair control is --baseline: one prompt of the summed length, as many tokens.

    Every prompt answers everything once, and selectors look at the inputs alone.
    """

    out: Path
    """The study, a JSON file; beside it goes a figure of the same name, .png."""
    adapter: Path
    """Folder of the pool."""
    selector: tuple[str, ...] = ()
    """Selectors to study, by name or as file.py:name; by default every built-in one that has no
    parameters. The pool's own is always among them."""
    baseline: tuple[Path, ...] = ()
    """Folders of other adapters for the same items, such as one prompt of the summed length."""
    overwrite: bool = False
    """Replace `out` if it holds a study, and the figure."""

    def __post_init__(self):
        super().__post_init__()
        read = {"model": self.model, "adapter": self.adapter}
        read |= {"text": self.perplexity, "task-data": self.task_data}
        check_apart(self.out, read)
        for folder in self.baseline:
            check_apart(self.out, {"baseline": folder})
        if self.out.suffix == ".png":
            raise ConfigError(
                f"--out {self.out} is the figure's name; give a file such as study.json"
            )
        if not self.task_names and self.perplexity is None:
            raise ConfigError("nothing to study: give --tasks, --perplexity or both")
        for name, values in (("selector", self.selector), ("baseline", self.baseline)):
            if len(set(values)) < len(values):
                raise ConfigError(f"--{name} names one twice: {' '.join(map(str, values))}")
