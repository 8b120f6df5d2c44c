"""What a sweep found, as one file of a typed and versioned schema; see `results` for its parts.

The invariant: a file is valid JSON of the schema that it names. A trial that diverged has an
infinite loss, which is null in the file.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from idp_jax.evaluation.results import Part, VariantResult, read_as, write_finite
from idp_jax.evaluation.statistics import Estimate, Number

SWEEP_SCHEMA = "idp-jax.sweep/1"
_UNBOUNDED = {"interval", "metrics", "groups", "loss", "low", "high", "perplexity"}


@dataclass(frozen=True)
class Trial(Part):
    """One learning rate of a recipe.

    Attributes:
        loss: the lowest validation loss, nats a token, on text that chooses and is not reported;
            infinite where training diverged.
        best_step: the step that had it.
    """

    learning_rate: float
    loss: Number
    best_step: int | None = None


@dataclass(frozen=True)
class Baseline(Part):
    """A model without repair, named as its variant; a perplexity that no float holds is None."""

    name: str
    perplexity: float | None
    second_perplexity: float | None = None
    accuracy: dict[str, Estimate] = field(default_factory=dict)


@dataclass(frozen=True)
class Control(Part):
    """What a recipe changes beside the uncompressed model, against that model alone.

    Attributes:
        perplexity, second_perplexity: ratios, paired over windows.
        accuracy: differences by task, paired over items.
    """

    perplexity: Estimate
    second_perplexity: Estimate | None
    accuracy: dict[str, Estimate]


@dataclass(frozen=True, kw_only=True)
class RecipeResult(Part):
    """What a recipe did for a compressed model; numbers are means over its seeds.

    Attributes:
        trials: of its learning rates, from the smallest on.
        chosen: the learning rate with the lowest loss; None where all diverged.
        edge: whether that is the first or last of the grid, so that a better one may lie outside.
        seeds: those that were trained to the end.
        diverged: the others.
        parameters: what the adapter adds to the model.
        tokens: that one seed was trained on.
        seconds: that one seed took, loading and compilation included.
        shares: by seed, the part of the log-perplexity that compression cost and the recipe gave
            back: (compressed - repaired) / (compressed - dense).
        share: their mean, with Student's interval over seeds.
        share_windows: the same mean with a paired bootstrap interval over windows.
        against: the share minus the reference recipe's, paired over windows.
        perplexity, second_perplexity: exp of the mean loss of the two texts.
        second_ratio: to the compressed model's, paired over windows.
        accuracy: by task that was asked for.
        accuracy_change: against the compressed model, paired over items.
        control: beside the uncompressed model.
    """

    compression: str
    recipe: str
    trials: list[Trial]
    chosen: float | None
    edge: bool
    seeds: list[int] = field(default_factory=list)
    diverged: list[int] = field(default_factory=list)
    parameters: int = 0
    tokens: int = 0
    seconds: float = 0.0
    shares: list[float] = field(default_factory=list)
    share: Estimate | None = None
    share_windows: Estimate | None = None
    against: Estimate | None = None
    perplexity: float | None = None
    second_perplexity: float | None = None
    second_ratio: Estimate | None = None
    accuracy: dict[str, Estimate] = field(default_factory=dict)
    accuracy_change: dict[str, Estimate] = field(default_factory=dict)
    control: Control | None = None


@dataclass(frozen=True, kw_only=True)
class SweepResults(Part):
    """The whole file.

    Attributes:
        config: the settings of the command.
        environment: device and versions.
        reference: the recipe that the others are compared with.
        baselines: the uncompressed model, then each compressed one.
        recipes: by compression, then by recipe.
        variants: all that was measured, item by item and window by window; those of the second
            text are named "NAME, second text".
    """

    schema: str = SWEEP_SCHEMA
    config: dict[str, Any]
    environment: dict[str, Any]
    reference: str
    baselines: list[Baseline]
    recipes: list[RecipeResult]
    variants: list[VariantResult] = field(default_factory=list)


def write_sweep(results: SweepResults, path: str | Path) -> None:
    """Writes the file, which is complete or absent.

    Raises:
        ConfigError: a number is none, or infinite where none may be.
    """
    write_finite(asdict(results), path, _UNBOUNDED)


def read_sweep(path: str | Path) -> SweepResults:
    """Reads a sweep's results.

    Raises:
        ConfigError: the file is missing, no JSON, of another schema, or lacks or misuses a key.
    """
    return read_as(SweepResults, SWEEP_SCHEMA, path)
