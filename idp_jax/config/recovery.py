"""Groups of settings that training takes: what is learned from, how, and from which start.

A group knows no command; see `groups` for those that several commands share.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, get_args

from idp_jax.config.choices import (
    Biases,
    Documents,
    InitFrom,
    InitTokens,
    LoraStart,
    PoolKind,
    PoolMixture,
    PoolTraining,
    Schedule,
    SinkName,
    TeacherForm,
)
from idp_jax.config.groups import ConfigError, Settings, at_least, one_of


@dataclass(frozen=True)
class Optimizer(Settings):
    """AdamW behind a clip of the gradient's norm."""

    learning_rate: float | None = None
    """Default by method: 1e-3 for prompts and prefixes, 1e-4 for LoRA, 5e-4 for norms."""
    schedule: Schedule = "linear"
    """linear, cosine: warm-up, then a decay to 0; constant: one rate, so that more may follow."""
    warmup: float = 0.05
    """Fraction of the steps in which a linear or cosine schedule rises."""
    clip_norm: float = 1.0
    """Largest norm of the gradient."""
    weight_decay: float = 0.0
    """AdamW's."""

    def __post_init__(self):
        super().__post_init__()
        if self.learning_rate is not None and not 0 < self.learning_rate < math.inf:
            raise ConfigError(
                f"--optimizer.learning-rate {self.learning_rate} must be above 0, and finite"
            )
        if math.isinf(self.weight_decay):
            raise ConfigError(f"--optimizer.weight-decay {self.weight_decay} must be finite")
        if not 0 <= self.warmup <= 1:
            raise ConfigError(f"--optimizer.warmup {self.warmup} must lie between 0 and 1")
        if self.clip_norm <= 0:
            raise ConfigError(f"--optimizer.clip-norm {self.clip_norm} must be above 0")


@dataclass(frozen=True)
class Lora(Settings):
    """Low-rank updates."""

    section: ClassVar[str] = "lora."

    rank: int = 8
    """Columns of A, rows of B."""
    alpha: float = 16.0
    """The update is alpha / rank times A B."""
    targets: tuple[str, ...] = ("q", "v")
    """Matrices of every block: q k v o gate up down, or all."""
    rules: tuple[str, ...] = ()
    """Other ranks for some matrices: "layers\\.0\\. rank=16 alpha=32" or "gate_proj skip". A matrix
    that a rule gives a rank has an update, be it a target or not."""
    rank_stabilized: bool = False
    """The update is alpha / sqrt(rank) times A B (rsLoRA)."""
    masked: bool = False
    """Updates are 0 where the frozen matrix is (MaskLoRA), so that merging keeps a pruned model's
    zeros."""
    start: LoraStart = "zero"
    """zero leaves the model as it is; eora is the best update of this rank for the inputs of each
    matrix, by --teacher.model."""
    windows: int = 32
    """Windows of the training text that eora measures the inputs with."""

    def __post_init__(self):
        super().__post_init__()
        at_least("lora.rank", self.rank, 1)
        at_least("lora.windows", self.windows, 1)
        if not math.isfinite(self.alpha):
            raise ConfigError(f"--lora.alpha {self.alpha} must be finite")
        if not self.targets and not self.rules:
            raise ConfigError("--lora.targets must name at least one matrix, such as q")
        if self.masked and self.start == "eora":
            raise ConfigError(
                "--lora.masked cuts what --lora.start eora computes; give one of the two"
            )


@dataclass(frozen=True)
class Norms(Settings):
    """Norms and biases (PERP)."""

    biases: Biases = "existing"
    """Biases of matrices that are trained beside the norms: those that the model has, all, or none;
    new ones begin at 0."""


@dataclass(frozen=True)
class Data(Settings):
    """Training and validation text, packed into windows without gaps."""

    section: ClassVar[str] = "data."
    urls: ClassVar[tuple[str, ...]] = ("train", "validation")

    train: str | None = None
    """A .txt or .jsonl file, hub:NAME[:CONFIG], or self (text that the teacher, or by
    default the model itself, writes)."""
    validation: str | None = None
    """The same kinds; by default the last windows of the training text are held out."""
    validation_windows: int = 32
    """Windows of every validation."""
    sequence_length: int = 1024
    """Tokens of a window."""
    documents: Documents = "joined"
    """joined: by blank lines, into one text; apart: side by side in a window, each by itself."""

    def __post_init__(self):
        super().__post_init__()
        at_least("data.sequence-length", self.sequence_length, 2)
        at_least("data.validation-windows", self.validation_windows, 1)


@dataclass(frozen=True)
class Teacher(Settings):
    """The uncompressed model, which says what the repaired one should have said."""

    section: ClassVar[str] = "teacher."
    urls: ClassVar[tuple[str, ...]] = ("model",)

    model: str | None = None
    """Hub name, model folder or GGUF file; it also writes the text of --data.train self."""
    form: TeacherForm = "full"
    """What kl is computed from: all logits, the likeliest tokens and the rest, or samples."""
    tokens: int = 64
    """Tokens of a position that are kept, for topk and sampled."""
    temperature: float = 1.0
    """Both models' logits are divided by it."""
    cache: Path | None = None
    """Folder that keeps its word, so that it runs once on a text; of full, hidden states."""

    def __post_init__(self):
        super().__post_init__()
        at_least("teacher.tokens", self.tokens, 1)
        if not 0 < self.temperature < math.inf:
            raise ConfigError(
                f"--teacher.temperature {self.temperature} must be above 0, and finite"
            )


@dataclass(frozen=True)
class Init(Settings):
    """What a prompt or prefix begins as; each prompt of a pool takes its own part of a text."""

    section: ClassVar[str] = "init."
    words: ClassVar[tuple[str, ...]] = ("text",)

    tokens: InitTokens = "vocabulary"
    """Rows of the vocabulary, drawn by the seed; the embeddings of real text; numbers drawn like
    those of the embedding; or zeros. A prefix begins as the keys and values of such a prompt."""
    text: str | None = None
    """For tokens = text: the words, repeated or cut to the length ("" is the BOS token alone, as
    IntactKV has it); by default the first of the training text."""
    file: Path | None = None
    """For tokens = text: a .txt or .jsonl file, whose first tokens are taken instead."""
    model: InitFrom = "compressed"
    """Whose keys and values a prefix begins with: the model's own or those of --teacher.model."""
    frozen_tokens: int = 0
    """First tokens that stay as they begin; 1 keeps the attention sink (Cartridges)."""

    def __post_init__(self):
        super().__post_init__()
        at_least("init.frozen-tokens", self.frozen_tokens, 0)
        if self.text is not None and self.file is not None:
            raise ConfigError("--init.text and --init.file are both given; give one of them")
        given = "text" if self.text is not None else "file" if self.file is not None else None
        if given and self.tokens != "text":
            raise ConfigError(
                f"--init.{given} is given, but --init.tokens {self.tokens} takes none; give "
                "--init.tokens text"
            )


@dataclass(frozen=True)
class Prefix(Settings):
    """Keys and values of every layer, --prompt-length of them where nothing else is said."""

    lengths: tuple[int, ...] = ()
    """Tokens of each layer from the first to the last, 0 allowed; the input follows the longest."""
    by_damage: bool = False
    """Lengths by each layer's mean error in the model's compression.json, --prompt-length on
    average."""
    projection: int | None = None
    """Width of an MLP that the prefix is trained through (512 in Li and Liang); it adds to the
    start, which it does not change, and is dropped at saving."""

    def __post_init__(self):
        super().__post_init__()
        if self.lengths and (min(self.lengths) < 0 or not max(self.lengths)):
            raise ConfigError(
                f"--prefix.lengths {' '.join(map(str, self.lengths))} must not be below 0, nor 0 "
                "in every layer"
            )
        if self.lengths and self.by_damage:
            raise ConfigError("--prefix.lengths and --prefix.by-damage are both given; give one")
        if self.projection is not None:
            at_least("prefix.projection", self.projection, 1)


@dataclass(frozen=True)
class Pool(Settings):
    """What a pool holds, and how it is trained."""

    of: PoolKind = "prompts"
    """Soft prompts of any lengths, or prefixes (keys and values of every layer) of one length."""
    training: PoolTraining = "apart"
    """Each by itself (the paper), jointly with the selector, or each on a cluster of the text."""
    mixture: PoolMixture = "gumbel"
    """Of joint training: one prompt by Gumbel noise, straight through, or a soft mixture."""
    temperature: tuple[float, float] = (1.0, 0.1)
    """Of joint training's choice: at the first and at the last step."""
    balance: float = 0.01
    """Weight of the term that has the prompts used alike."""
    distractors: int = 0
    """Other prompts of the pool that stand before the input in joint training, too."""

    def __post_init__(self):
        super().__post_init__()
        at_least("pool.distractors", self.distractors, 0)
        at_least("pool.balance", self.balance, 0)
        if not all(0 < temperature < math.inf for temperature in self.temperature):
            raise ConfigError(f"--pool.temperature {self.temperature} must be above 0, and finite")


@dataclass(frozen=True)
class Tracking(Settings):
    """Where a run's numbers go beside metrics.jsonl."""

    section: ClassVar[str] = "tracking."

    sinks: tuple[SinkName, ...] = ("tensorboard",)
    """tensorboard (left out where tensorboardX is not installed), wandb, trackio."""
    project: str = "idp-jax"
    """The project of wandb and trackio."""

    def __post_init__(self):
        super().__post_init__()
        for name in self.sinks:
            one_of("tracking.sinks", name, get_args(SinkName))
        if len(set(self.sinks)) < len(self.sinks):
            raise ConfigError(f"--tracking.sinks names one twice: {' '.join(self.sinks)}")
