"""A sweep: methods of recovery, each tried at as many learning rates, then compared over seeds.

A recipe is what differs from the defaults of `train`. The invariant: what a comparison stands on
(the model, the budget, the text, the seeds, the number of trials) is the sweep's alone, and no
recipe can change it.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from idp_jax.config.choices import LEARNING_RATES
from idp_jax.config.commands import Compress, Train
from idp_jax.config.corpora import Corpora
from idp_jax.config.experiment import PLACED, Recipes, check_names, check_recipes, taught
from idp_jax.config.groups import Compression, ConfigError, Settings, at_least
from idp_jax.config.marks import Suppress
from idp_jax.config.places import check_apart

# Of `train`, what a recipe may not say.
_SHARED = (
    *("model", "out", "tokens", "batch_size", "data", "seed"),
    *("evaluate_every", "checkpoint_every", "keep_checkpoints", "plan", "profile"),
)


@dataclass(frozen=True, kw_only=True)
class Sweep(Settings):
    """Compare methods of recovery, each with as many learning rates.

    A method that was given more trials than another wins by them, so here:

      1. every recipe (some settings of `train`) has the same number of trials;
      2. text that is not reported chooses each recipe's learning rate;
      3. with it every seed is trained anew, and measured on other text.

    What is compared stands in a YAML file:

      model: smollm2-135m
      out: runs/sweep
      data: {train: c4/train.jsonl, held_out: c4/validation.jsonl}
      compressions: {three-bit: {bits: 3}}
      recipes:
        prompt: {method: prompt, prompt_length: 50}
        lora: {method: lora, lora: {rank: 16}}
      learning_rates:
        prompt: [0.003, 0.01, 0.03]
        lora: [0.0003, 0.001, 0.003]

    Started again, a sweep goes on; recipes and seeds may join it later.
    """

    urls: ClassVar[tuple[str, ...]] = ("out",)
    writes: ClassVar[Literal["folder", "file"] | None] = "folder"

    model: str
    """Hub name, model folder or GGUF file of the uncompressed model, which is the teacher, too."""
    out: Path
    """Folder of all that is written: sweep.json, sweep.md, sweep.png and what they rest on."""
    data: Corpora
    compression: Compression = field(default_factory=Compression)
    """What all compressions have in common."""
    compressions: Suppress[Recipes] = field(default_factory=lambda: {"compressed": {}})
    """By name, settings of `compress` that differ from `compression`, or a compressed `model`."""
    recipes: Suppress[Recipes] = field(default_factory=dict)
    """By name, settings of `train`."""
    learning_rates: Suppress[dict[str, tuple[float, ...]]] = field(default_factory=dict)
    """By recipe, the learning rates that are tried; as many for each."""
    factors: tuple[float, ...] = (0.3, 1.0, 3.0)
    """Of recipes without learning rates of their own: times the one that the recipe has."""
    trial_tokens: int = 32_768
    """Tokens that a learning rate is tried with."""
    tokens: int = 131_072
    """Tokens that every seed is trained on (each prompt of a pool, too)."""
    batch_size: int = 4
    """Windows of a training step."""
    evaluate_every: int = 16
    """Training steps between two validations, of which the best adapter is kept."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """Of the trainings that are reported."""
    seed: int = 0
    """Of trials, calibration and resampled intervals."""
    cache_teacher: bool = False
    """Keep the uncompressed model's hidden states of the training text on disk (width x 4 bytes a
    token), so that it runs once for all recipes that learn from it."""
    dense_controls: bool = False
    """Train each recipe beside the uncompressed model, too: what it gains there is no repair."""
    reference: str | None = None
    """The recipe that the others are compared with; by default the first."""
    tasks: str = "knowledge"
    """lm-eval tasks, separated by commas; `knowledge` is the built-in probe."""
    task_data: Path | None = None
    """Folder with a local copy of every task's data, TASK/{train,validation,test}.jsonl[.gz]."""
    items: int | None = None
    """Items of each task; by default all."""
    plan: bool = False
    """Check everything, print what would be trained, and stop."""

    def __post_init__(self):
        super().__post_init__()
        read = {"data.train": self.data.train, "data.held-out": self.data.held_out}
        read |= {"data.second": self.data.second, "task-data": self.task_data}
        check_apart(self.out, {"model": self.model, **read})
        at_least("batch-size", self.batch_size, 1)
        at_least("evaluate-every", self.evaluate_every, 1)
        at_least("trial-tokens", self.trial_tokens, self.batch_size * self.data.sequence_length)
        at_least("tokens", self.tokens, self.batch_size * self.data.sequence_length)
        if self.items is not None:
            at_least("items", self.items, 1)
        if not self.recipes or not self.compressions:
            raise ConfigError("a sweep needs compressions and recipes: name them in a YAML file")
        known = {seed for seed in self.seeds if 0 <= seed < 2**32}
        if not self.seeds or len(known) < len(self.seeds):
            raise ConfigError(
                f"--seeds {self.seeds} must be different numbers between 0 and {2**32 - 1}"
            )
        self._check_names()
        self._check_rates()

    def _check_names(self) -> None:
        for what, known in (("compressions", self.compressions), ("recipes", self.recipes)):
            check_names(what, known)
        if "dense" in self.compressions:
            raise ConfigError("compressions: 'dense' is the uncompressed model; give another name")
        check_recipes("recipes", self.recipes, Train, _SHARED)
        made = {name: recipe for name, recipe in self.compressions.items() if "model" not in recipe}
        check_recipes("compressions", made, Compress, PLACED)
        asked = [*self.learning_rates, *([self.reference] if self.reference else [])]
        for name in asked:
            if name not in self.recipes:
                raise ConfigError(f"no recipe {name!r}; there are {', '.join(self.recipes)}")

    def _check_rates(self) -> None:
        """Refuses grids of different sizes: more trials are an advantage by themselves."""
        grids = {name: self.rates(name) for name in self.recipes}
        first = next(iter(grids))
        for name, rates in grids.items():
            if not rates or min(rates) <= 0 or len(set(rates)) < len(rates):
                raise ConfigError(
                    f"learning_rates.{name}: {list(rates)} must be different numbers above 0"
                )
            if len(rates) != len(grids[first]):
                raise ConfigError(
                    f"learning_rates: {first} is tried at {len(grids[first])}, {name} at "
                    f"{len(rates)}; give each recipe as many"
                )

    def rates(self, recipe: str) -> tuple[float, ...]:
        """The learning rates that a recipe is tried at, from the smallest on."""
        given = self.learning_rates.get(recipe)
        if given is not None:
            return tuple(sorted(given))
        settings = self.recipes[recipe]
        base = (settings.get("optimizer") or {}).get("learning_rate")
        base = float(base or LEARNING_RATES.get(settings.get("method", "prompt"), 1e-3))
        # 0.3 * 0.01 is 0.0029999999999999996, which no one wants in a table.
        return tuple(sorted(float(f"{base * factor:.4g}") for factor in self.factors))

    def training(self, recipe: str, rate: float, model: str, out: Path, **settings: Any) -> Train:
        """What `train` is asked for.

        Args:
            settings: of the whole sweep: data, tokens and seed.

        Raises:
            ConfigError: the recipe has a setting that is none, or that is out of range.
        """
        own = self.recipes[recipe]
        common = {
            "model": model,
            "out": out,
            "batch_size": self.batch_size,
            "evaluate_every": self.evaluate_every,
            "checkpoint_every": self.evaluate_every,
        }
        optimizer = {**(own.get("optimizer") or {}), "learning_rate": rate}
        tree = {**own, **common, **settings, "optimizer": optimizer}
        cache = self.out / "teacher" if self.cache_teacher else None
        return taught(tree, self.model, f"recipes.{recipe}", cache)
