"""An experiment: variants of one model, and the settings that compress, repair and measure them.

Compressions and adapters are named recipes: what differs from the common settings. The invariant:
the variants alone say what is made, so a larger grid is more variants and more recipes, not more
code.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

from idp_jax.config.choices import Role
from idp_jax.config.commands import Compress, Train
from idp_jax.config.corpora import Corpora
from idp_jax.config.files import from_dict, part_from_dict
from idp_jax.config.groups import Compression, ConfigError, Settings, Timing, at_least
from idp_jax.config.marks import Suppress
from idp_jax.config.places import check_apart

Recipes = dict[str, dict[str, Any]]

# Of `compress`, what no recipe of an experiment or sweep may say.
PLACED = ("model", "out", "calibration", "samples", "sequence_length", "seed", "plan", "overwrite")

# Instead of a selector: the pool's prompt that had the best validation loss, and the one that
# answers an item best, which needs its answer.
BEST, ORACLE = "best-fixed", "oracle"
SECOND = ", second text"  # behind the name of a variant, where it was measured on that

_NAME = re.compile(r"\w[\w.+-]*")  # what may be a folder's name everywhere


def check_names(what: str, names: Iterable[str]) -> None:
    """Refuses names that cannot be those of folders, by a ConfigError."""
    for name in names:
        if not _NAME.fullmatch(name):
            raise ConfigError(
                f"{what}: {name!r} cannot name a folder; use letters, digits, . + - and _"
            )


def check_recipes(what: str, recipes: Recipes, kind: type, common: Sequence[str]) -> None:
    """Refuses recipes with settings that are none, or that are the same for all.

    Args:
        what: a recipe is called in errors.
        kind: whose settings they are: `Train` or `Compress`.
        common: the settings that no recipe may change.

    Raises:
        ConfigError: it names the recipe and the setting.
    """
    for name, recipe in recipes.items():
        taken = [key for key in common if key in recipe]
        if taken:
            raise ConfigError(
                f"{what}.{name}: {taken[0]} is the same for all, and no recipe's to change"
            )
        part_from_dict(kind, recipe, f"{what}.{name}")


def taught(recipe: dict[str, Any], model: str, origin: str, cache: Path | None = None) -> Train:
    """A recipe's training, with the uncompressed model as its teacher where it needs one.

    Args:
        recipe: settings of `train`; a teacher's model that it names itself stays.
        model: the uncompressed model.
        origin: what an error names.
        cache: a folder for the hidden states of this teacher, which trainings share where their
            objectives are computed from all of its word.

    Raises:
        ConfigError: a setting that is none, or that is out of range.
    """
    own = recipe.get("teacher") or {}
    # Only the whole settings tell whether they need it, and some are none without it.
    found = from_dict(Train, {**recipe, "teacher": {"model": model, **own}}, origin)
    if "model" in own:
        return found
    if not (_heard(found) or found.starts_from_teacher):
        return from_dict(Train, recipe, origin)
    if cache is None or "cache" in own or found.teacher.form != "full" or not _heard(found):
        return found
    return replace(found, teacher=replace(found.teacher, cache=cache / (found.dtype or "default")))


def _heard(settings: Train) -> bool:
    """Whether the uncompressed model stands beside a training for its loss."""
    return set(re.findall(r"\b[a-z_]\w*", settings.objective)) != {"ce"}


@dataclass(frozen=True)
class Variant(Settings):
    """One row of an experiment's table."""

    name: str
    """For people, and for the file of its results."""
    role: Role
    """What it is in a comparison."""
    compression: str | None = None
    """One of the compressions by name; None is the uncompressed model."""
    adapter: str | None = None
    """One of the adapters by name, or NAME/PART for a part of it, such as one prompt of a pool."""
    selector: str | None = None
    """How a pool's prompt is chosen instead of the pool's own way; also `best-fixed` (always the
    one with the best validation loss) and `oracle` (per item the one that answers it best)."""


class Windows(NamedTuple):
    """How text is cut: tokens of a window, and how many windows each purpose has."""

    length: int
    calibration: int
    choosing: int
    reported: int


@dataclass(frozen=True, kw_only=True)
class Experiment(Settings):
    """Compress a model, repair it in several ways and score everything."""

    urls: ClassVar[tuple[str, ...]] = ("out",)
    writes: ClassVar[Literal["folder", "file"] | None] = "folder"

    model: str
    """Hub name, model folder or GGUF file of the uncompressed model."""
    out: Path
    """Folder of everything that is written; started again, the experiment goes on from there."""
    compression: Compression = field(default_factory=Compression)
    """What all compressions have in common."""
    compressions: Suppress[Recipes] = field(default_factory=lambda: {"compressed": {}})
    """By name, settings of `compress` that differ from `compression`."""
    adapters: Suppress[Recipes] = field(default_factory=dict)
    """By name, settings of `train` that differ from the experiment's."""
    variants: Suppress[tuple[Variant, ...]] = ()
    """The rows of the table; by default the whole grid of compressions and adapters."""
    data: Suppress[Corpora | None] = None
    """Texts and their windows; without them, text is sampled from the model and cut as below."""
    sequence_length: int = 256
    """Tokens of a window of text."""
    calibration_windows: int = 64
    """Windows that a compression is calibrated on."""
    validation_windows: int = 16
    """Windows held out from training; half choose the best step, half give the perplexity."""
    train_tokens: int = 30_720
    """Tokens that each prompt, and each other adapter, is trained on."""
    batch_size: int = 4
    """Windows of a training step."""
    evaluate_every: int = 10
    """Training steps between two validations."""
    tasks: str = "knowledge"
    """lm-eval tasks, separated by commas; `knowledge` is the built-in probe."""
    task_data: Path | None = None
    """Folder with a local copy of every task's data, TASK/{train,validation,test}.jsonl[.gz]."""
    items: int | None = None
    """Items of each task; by default all."""
    cache_teacher: bool = False
    """Keep the uncompressed model's hidden states of the training text on disk (width x 4 bytes a
    token), so that it runs once for all adapters that learn from it."""
    latency: bool = True
    """Measure the time of generation, too."""
    timing: Timing = field(default_factory=lambda: Timing(prompt_length=64, new_tokens=16))
    seed: int = 0
    """Of sampled text, initial values, the order of windows and resampled intervals."""

    def __post_init__(self):
        super().__post_init__()
        read = {"model": self.model, "task-data": self.task_data}
        if self.data is not None:
            read |= {"data.train": self.data.train, "data.held-out": self.data.held_out}
            read |= {"data.second": self.data.second}
        check_apart(self.out, read)
        for name in ("calibration_windows", "batch_size", "evaluate_every"):
            at_least(name.replace("_", "-"), getattr(self, name), 1)
        at_least("sequence-length", self.sequence_length, 2)
        at_least("validation-windows", self.validation_windows, 2)
        at_least("train-tokens", self.train_tokens, self.batch_size * self.windows.length)
        if self.items is not None:
            at_least("items", self.items, 1)
        check_recipes("compressions", self.compressions, Compress, PLACED)
        check_recipes("adapters", self.adapters, Train, ("model", "out", "data", "plan"))
        names = [variant.name for variant in self.rows]
        for variant in self.rows:
            self._check(variant)
            if names.count(variant.name) > 1:
                raise ConfigError(f"variants: two are called {variant.name!r}; name each one")

    @property
    def windows(self) -> Windows:
        """How text is cut, as `data` says or, of sampled text, the experiment."""
        if self.data is not None:
            data = self.data
            counts = data.calibration_windows, data.choosing_windows, data.reported_windows
            return Windows(data.sequence_length, *counts)
        half = self.validation_windows // 2
        return Windows(self.sequence_length, self.calibration_windows, half, half)

    @property
    def rows(self) -> tuple[Variant, ...]:
        """The variants, given or the whole grid: each model bare, and with every adapter."""
        if self.variants:
            return self.variants
        bare = [Variant(name, "compressed", name) for name in self.compressions]
        repaired = [
            Variant(f"{name} + {adapter}", "repaired", name, adapter)
            for name in self.compressions
            for adapter in self.adapters
        ]
        return (Variant("dense", "dense"), *bare, *repaired)

    @property
    def title(self) -> str:
        """The model and its compressions in a few words."""
        plain = list(self.compressions.values()) == [{}]
        compressed = self.compression.summary if plain else ", ".join(self.compressions)
        return f"{self.model}, {compressed or 'dense'}"

    def reference(self, variant: Variant) -> Variant | None:
        """What a variant is compared with: its model without adapter, or that uncompressed.

        None where there is no such variant.
        """
        model = variant.compression if variant.adapter is not None else None
        if variant.adapter is None and variant.compression is None:
            return None
        bare = (row for row in self.rows if row.adapter is None and row.compression == model)
        return next(bare, None)

    def _check(self, variant: Variant) -> None:
        recipe = variant.adapter.partition("/")[0] if variant.adapter else None
        for what, name, known in (
            ("compression", variant.compression, self.compressions),
            ("adapter", recipe, self.adapters),
        ):
            if name is not None and name not in known:
                raise ConfigError(
                    f"variant {variant.name!r}: no {what} {name!r}; there are "
                    f"{', '.join(known) or 'none'}"
                )
        if variant.selector is not None and variant.adapter is None:
            raise ConfigError(f"variant {variant.name!r}: a selector needs the adapter of a pool")


def _demo_adapters() -> Recipes:
    """Learn from the uncompressed model; keys and values begin as its own of real text."""
    rate = {"objective": "kl", "optimizer": {"learning_rate": 1e-2}}
    start = {"init": {"tokens": "text", "model": "teacher", "frozen_tokens": 1}}
    return {
        "prefix": {"method": "prefix", **rate, **start},
        "idp": {
            "method": "idp",
            "pool_lengths": [50, 50],
            "pool": {"of": "prefixes"},
            # What a prompt gets by an attention changes with the input's length; this less so.
            "selector": "calibrated(score='mean_logit')",
            **rate,
            **start,
        },
        "lora": {"method": "lora", **rate, "optimizer": {"learning_rate": 1e-3}},
    }


_DEMO_VARIANTS = (
    Variant("dense", "dense"),
    Variant("compressed", "compressed", "compressed"),
    Variant("prefix", "repaired", "compressed", "idp/prompt_0_50_tokens"),
    Variant("IDP", "repaired", "compressed", "idp"),
    Variant("LoRA", "repaired", "compressed", "lora"),
    Variant("IDP, random choice", "control", "compressed", "idp", "random"),
    Variant("dense + prefix", "control", None, "prefix"),
)


@dataclass(frozen=True, kw_only=True)
class Demo(Experiment):
    """Compress a small model, repair it in several ways, score all."""

    model: str = "smollm2-135m"
    """Hub name, model folder or GGUF file of the uncompressed model."""
    out: Path = Path("runs/demo")
    """Folder of everything that is written; started again, the demo goes on from there."""
    adapters: Suppress[Recipes] = field(default_factory=_demo_adapters)
    """By name, settings of `train` that differ from the experiment's."""
    variants: Suppress[tuple[Variant, ...]] = _DEMO_VARIANTS
    """The rows of the table."""
    train_tokens: int = 10_240
    """Tokens that each prompt, and each other adapter, is trained on."""
    batch_size: int = 2
    """Windows of a training step."""
    cache_teacher: bool = True
    """Keep the uncompressed model's hidden states of the training text on disk (width x 4 bytes a
    token), so that it runs once for all adapters that learn from it."""
