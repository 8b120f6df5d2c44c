"""A grid: models x compressions x methods x seeds, with the controls that a claim needs.

The invariant: a cell is one `Experiment` (a model, one compression or none, a seed) in a folder of
its own that needs no other cell, so cells run in any order and on any machine.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from idp_jax.config.commands import Compress, Train
from idp_jax.config.corpora import Corpora
from idp_jax.config.experiment import (
    BEST,
    ORACLE,
    PLACED,
    Experiment,
    Recipes,
    Variant,
    check_names,
    check_recipes,
    taught,
)
from idp_jax.config.files import to_dict
from idp_jax.config.groups import Compression, ConfigError, Settings, at_least
from idp_jax.config.marks import Suppress
from idp_jax.config.places import check_apart

DENSE = "dense"
RANDOM, SUMMED = "random", "summed"
CONTROLS = (RANDOM, BEST, ORACLE, SUMMED)  # of a pool, as this grid names its rows

_CELLS = re.compile(r"([0-9]+)/([0-9]+)")
_POOL = ("pool", "pool_lengths", "selector")  # settings of `train` that one prompt has no use for


class Cell(NamedTuple):
    """One part of the grid.

    Attributes:
        model, compression, seed: what it is of; no compression is the uncompressed model.
        settings: of the experiment that it is.
    """

    model: str
    compression: str | None
    seed: int
    settings: Experiment

    @property
    def name(self) -> str:
        """For people: model, compression and seed."""
        return f"{self.model}, {self.compression or DENSE}, seed {self.seed}"

    @property
    def asked(self) -> dict[str, Any]:
        """Its settings, as its results hold them."""
        return to_dict(self.settings)


@dataclass(frozen=True, kw_only=True)
class Reproduce(Settings):
    """Compare repairs of compressed models over seeds, with controls.

    The grid is cut into cells:

      1. a cell is a model, a compression or none, and a seed, in its own folder;
      2. what was stopped goes on, and calls may share the cells (--cells 2/8);
      3. each call ends with the tables and figures of all finished cells.

    Models, compressions, recipes and seeds stand in a YAML file.
    """

    takes_file: ClassVar[bool] = True

    models: tuple[str, ...]
    """Hub names, model folders or GGUF files of the uncompressed models."""
    out: Path
    """Folder of all that is written: the cells, grid.md, grid.tex, grid.csv and figures."""
    data: Corpora
    compression: Compression = field(default_factory=Compression)
    """What all compressions have in common."""
    compressions: Suppress[Recipes] = field(default_factory=dict)
    """By name, settings of `compress` that differ from `compression`."""
    recipes: Suppress[Recipes] = field(default_factory=dict)
    """By name, settings of `train`."""
    dense: tuple[str, ...] = ()
    """Recipes that are trained beside the uncompressed models, too: what they gain is no repair."""
    controls: tuple[str, ...] = CONTROLS
    """What each pool is held against; summed is one prompt of all prompts' length and tokens."""
    tokens: int = 131_072
    """Tokens of every training (of each prompt of a pool, too)."""
    batch_size: int = 4
    """Windows of a training step."""
    evaluate_every: int = 16
    """Training steps between two validations, of which the best adapter is kept."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """Of initial values, the order of windows and calibration text that is drawn."""
    seed: int = 0
    """Of the items and windows that are drawn again for intervals."""
    tasks: str = "knowledge"
    """lm-eval tasks, separated by commas; `knowledge` is the built-in probe."""
    task_data: Path | None = None
    """Folder with a local copy of every task's data, TASK/{train,validation,test}.jsonl[.gz]."""
    items: int | None = None
    """Items of each task; by default all."""
    cache_teacher: bool = False
    """Keep the uncompressed model's hidden states of the training text on disk, cell by cell."""
    cells: str | None = None
    """Which part of the cells this call does, such as 2/8; by default all that are not done."""
    plan: bool = False
    """Check everything, print cells, trainings, tokens and about the time, and stop."""

    def __post_init__(self):
        super().__post_init__()
        read = {"data.train": self.data.train, "data.held-out": self.data.held_out}
        read |= {"data.second": self.data.second, "task-data": self.task_data}
        check_apart(self.out, {**{f"model {name}": name for name in self.models}, **read})
        if not self.models or not self.compressions or not self.recipes or not self.seeds:
            raise ConfigError("a grid needs models, compressions, recipes and seeds")
        if min(self.seeds) < 0 or max(self.seeds) >= 2**32 or _twice(self.seeds):
            raise ConfigError(f"--seeds {self.seeds} must be different numbers in [0, {2**32})")
        at_least("tokens", self.tokens, self.batch_size * self.data.sequence_length)
        self._check_names()
        self.part()
        self.all_cells()

    def _check_names(self) -> None:
        check_names("compressions", self.compressions)
        check_names("recipes", self.recipes)
        check_recipes("compressions", self.compressions, Compress, PLACED)
        shared = ("model", "out", "tokens", "batch_size", "data", "seed", "plan", "profile")
        check_recipes("recipes", self.recipes, Train, shared)
        if DENSE in self.compressions:
            raise ConfigError("compressions: 'dense' is the uncompressed model; give another name")
        folders = tuple(map(_folder, self.models))
        if _twice(folders):
            raise ConfigError(f"--models: two have the folder {_twice(folders)}; rename one")
        for what, names, known in (
            ("dense", self.dense, tuple(self.recipes)),
            ("controls", self.controls, CONTROLS),
        ):
            for name in names:
                if name not in known:
                    raise ConfigError(f"--{what} {name} is not one of {', '.join(known)}")

    @property
    def pools(self) -> tuple[str, ...]:
        """The recipes that train a pool."""
        return tuple(name for name in self.recipes if self._whole(name).method == "idp")

    def part(self) -> tuple[int, int]:
        """Which part of the cells is asked for, (i, n), 1 <= i <= n; raises ConfigError."""
        found = _CELLS.fullmatch(self.cells or "1/1")
        number, parts = map(int, found.groups()) if found else (0, 0)
        if not 1 <= number <= parts:
            raise ConfigError(f"--cells {self.cells} is no part such as 1/8 to 8/8")
        return number, parts

    def all_cells(self) -> list[Cell]:
        """Every cell, the uncompressed model of each seed first: others are compared with it."""
        return [
            Cell(model, compression, seed, self._experiment(model, compression, seed))
            for model in self.models
            for seed in self.seeds
            for compression in (None, *self.compressions)
        ]

    def chosen_cells(self) -> list[Cell]:
        """The cells of the part that is asked for."""
        number, parts = self.part()
        return self.all_cells()[number - 1 :: parts]

    def _experiment(self, model: str, compression: str | None, seed: int) -> Experiment:
        own = {} if compression is None else {compression: self.compressions[compression]}
        return Experiment(
            model=model,
            out=self.out / _folder(model) / (compression or DENSE) / f"seed-{seed}",
            data=self.data,
            compression=self.compression,
            compressions=own,
            adapters=self._adapters(),
            variants=self._variants(compression),
            train_tokens=self.tokens,
            batch_size=self.batch_size,
            evaluate_every=self.evaluate_every,
            tasks=self.tasks,
            task_data=self.task_data,
            items=self.items,
            cache_teacher=self.cache_teacher,
            latency=False,
            seed=seed,
        )

    def _adapters(self) -> Recipes:
        """The recipes, and one prompt of the summed length for each pool."""
        if SUMMED not in self.controls:
            return self.recipes
        return self.recipes | {f"{name}-{SUMMED}": self._summed(name) for name in self.pools}

    def _whole(self, recipe: str) -> Train:
        """A recipe with its defaults."""
        places = {"model": DENSE, "out": self.out / "run"}
        return taught(self.recipes[recipe] | places, DENSE, f"recipes.{recipe}")

    def _summed(self, pool: str) -> dict[str, Any]:
        whole = self._whole(pool)
        return {
            **{name: own for name, own in self.recipes[pool].items() if name not in _POOL},
            "method": "prefix" if whole.pool.of == "prefixes" else "prompt",
            "prompt_length": sum(whole.pool_lengths),
            "tokens": self.tokens * len(whole.pool_lengths),
        }

    def _variants(self, compression: str | None) -> tuple[Variant, ...]:
        if compression is None:
            beside = (Variant(row_name(None, name), "control", None, name) for name in self.dense)
            return (Variant(DENSE, "dense"), *beside)
        rows = [Variant(compression, "compressed", compression)]
        for name in self.recipes:
            rows.append(Variant(row_name(compression, name), "repaired", compression, name))
            for control in self.controls if name in self.pools else ():
                shown = row_name(compression, name, control)
                adapter, selector = (name, control)
                if control == SUMMED:
                    adapter, selector = f"{name}-{SUMMED}", None
                rows.append(Variant(shown, "control", compression, adapter, selector))
        return tuple(rows)


def row_name(compression: str | None, recipe: str, control: str | None = None) -> str:
    """What a row of a cell is called."""
    return f"{compression or DENSE} + {recipe}" + (f", {control}" if control else "")


def _folder(model: str) -> str:
    return re.sub(r"[^\w.+-]+", "_", model).strip("._") or "model"


def _twice(values: tuple) -> Any:
    """A value that is there twice, or None."""
    return next((each for each in values if values.count(each) > 1), None)
