"""What was measured, as one file of a typed and versioned schema.

`eval` and the experiments write a `Results`; comparisons, tables and figures read one. The
invariant: a file is valid JSON of the schema that it names, so whoever reads one may rely on every
key below; not-a-number is refused when it is written, not found out later. An infinity (of a
perplexity that no float holds) is null in the file, and is read back as what it was.
"""

import json
import math
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from idp_jax.config.choices import Role
from idp_jax.config.files import from_dict
from idp_jax.config.groups import ConfigError
from idp_jax.evaluation.paired import PooledTest, TaskTest
from idp_jax.evaluation.statistics import Estimate, Number
from idp_jax.jobs.files import write_json

SCHEMA = "idp-jax.results/1"
NOT_FINITE = "the model, its adapter or its selector gives numbers that cannot be computed with"
# Beside a perplexity itself.
_UNBOUNDED = frozenset({"interval", "metrics", "groups", "comparisons", "measures"})
ACCURACIES = ("acc", "exact_match")  # a task's main metric: the first of these that it has
LOWER_IS_BETTER = frozenset({"bits_per_byte"})  # of the metrics of an item

Whole = TypeVar("Whole")


class Part:
    """The base of everything in the schema: a key that it does not know is refused."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}


@dataclass(frozen=True)
class PerplexityResult(Part):
    """A perplexity, and what is needed to compare it with another on the same windows.

    Attributes:
        perplexity: exp(mean_nll).
        mean_nll: mean negative log-likelihood of a token, natural log.
        tokens: the number of tokens scored, windows * (T - 1).
        windows: the number of windows.
        per_window_nll: the mean loss of each window.
        digest: of the windows' tokens; equal digests are of the same text, cut in the same way.
        file: where the text came from.
        interval: 95 % of the perplexity, over windows; None where there is only one.
    """

    perplexity: Number
    mean_nll: float
    tokens: int
    windows: int
    per_window_nll: list[float]
    digest: str
    file: str | None = None
    interval: tuple[float, Number] | None = None


@dataclass(frozen=True)
class LatencyResult(Part):
    """Times of greedy generation, and the protocol.

    Attributes:
        prefill_ms, decode_ms_per_token: medians; a token is one step of the whole batch.
        tokens_per_second: of decoding, all rows.
        prefill_ms_runs, decode_ms_per_token_runs: of every run.
        prompt_length: text tokens; `soft_prompt_tokens` come on top.
        lora: "unmerged" or "none".
    """

    prefill_ms: float
    decode_ms_per_token: float
    tokens_per_second: float
    prefill_ms_runs: list[float]
    decode_ms_per_token_runs: list[float]
    batch_size: int
    prompt_length: int
    soft_prompt_tokens: int
    new_tokens: int
    repeats: int
    device: str
    dtype: str
    lora: str


@dataclass(frozen=True)
class TaskResult(Part):
    """The scores of one task.

    Attributes:
        metrics: every metric of the harness by name.
        interval: 95 % (Wilson) of those that are right or wrong by item.
        items: how many were scored; the lists below hold these.
        num_fewshot: examples before each item.
        version: the task's own, in the harness.
        samples: by metric one score per item, in the order of the items.
        documents: the harness's hash of every item, in the same order.
        choices: how often each prompt of the pool was chosen; None without a pool.
        prompts: of every item the prompts that were chosen for it, one for each of its questions
            or windows; None without a pool.
        refused: by number of the item, why it could not be scored.
        chance: the share of right answers of guessing, where there are options to choose from.
        labels: by field of the documents that groups them (`relation`), its value for every item.
        questions: a digest of all prompts; None where it was not kept.
    """

    metrics: dict[str, Number]
    interval: dict[str, tuple[float, float]]
    items: int
    num_fewshot: int | None
    version: float | str | None
    samples: dict[str, list[float]]
    documents: list[str]
    choices: list[int] | None = None
    prompts: list[list[int]] | None = None
    refused: dict[int, str] = field(default_factory=dict)
    chance: float | None = None
    labels: dict[str, list[str]] = field(default_factory=dict)
    questions: str | None = None

    @property
    def accuracy(self) -> str | None:
        """The name of the main metric, where the task has one of `ACCURACIES`."""
        return next((name for name in ACCURACIES if name in self.samples), None)


@dataclass(frozen=True)
class TaskScores(Part):
    """The scores of several tasks.

    Attributes:
        tasks: by name.
        groups: the metrics of groups of tasks, without intervals.
        mean_accuracy: the mean of the main metrics of the tasks and groups that were asked for,
            each counted once.
    """

    tasks: dict[str, TaskResult] = field(default_factory=dict)
    groups: dict[str, dict[str, Number]] = field(default_factory=dict)
    mean_accuracy: float | None = None

    @property
    def choices(self) -> list[int] | None:
        """How often each prompt of a pool was chosen in all tasks; None without a pool."""
        counted = [task.choices for task in self.tasks.values() if task.choices is not None]
        return [sum(counts) for counts in zip(*counted, strict=True)] if counted else None


@dataclass(frozen=True, kw_only=True)
class VariantResult(TaskScores):
    """One model as it was measured: the scores of its tasks, and the rest.

    Attributes:
        name: for people.
        role: what it is in a comparison.
        model: the name or folder that was loaded.
        adapter: the folder of its repair.
        selector: how the pool's prompt was chosen; None is the pool's own way.
        extra_parameters: what the adapter adds to the model.
        prompt_lengths: tokens of each prompt in front of the input, in the order of `choices`.
        perplexity, latency: None where they were not measured.
    """

    name: str
    role: Role
    model: str
    adapter: str | None = None
    selector: str | None = None
    extra_parameters: int = 0
    prompt_lengths: list[int] = field(default_factory=list)
    perplexity: PerplexityResult | None = None
    latency: LatencyResult | None = None

    @property
    def prompt_names(self) -> list[str]:
        """The prompts of a pool for people: by length, and by number where that is not enough."""
        lengths = self.prompt_lengths
        if len(set(lengths)) == len(lengths):
            return [f"{length} tokens" for length in lengths]
        return [f"prompt {number}, {length} tokens" for number, length in enumerate(lengths)]


@dataclass(frozen=True)
class Comparison(Part):
    """Two variants on the same items and windows; differences are second - first.

    Attributes:
        first, second: their names.
        tasks: difference of the main metric by task, with a paired bootstrap interval.
        overall: the same over the items of all tasks together.
        perplexity_ratio: perplexity(second) / perplexity(first), where the windows are the same.
        tests: what may be said of each task.
        pooled: and of their mean; None where no task is tested.
        margin: the share below which a difference does not matter.
        cluster: the field of the documents that groups items.
    """

    first: str
    second: str
    tasks: dict[str, Estimate]
    overall: Estimate | None
    perplexity_ratio: Estimate | None
    tests: dict[str, TaskTest] = field(default_factory=dict)
    pooled: PooledTest | None = None
    margin: float | None = None
    cluster: str | None = None


@dataclass(frozen=True, kw_only=True)
class Results(Part):
    """The whole file.

    Attributes:
        schema: its name and version.
        config: the settings of the command.
        environment: device and versions, see `jobs.machine.describe`.
        variants: what was measured.
        comparisons: of variants, where the command makes any.
    """

    schema: str = SCHEMA
    config: dict[str, Any]
    environment: dict[str, Any]
    variants: list[VariantResult]
    comparisons: list[Comparison] = field(default_factory=list)

    def variant(self, name: str) -> VariantResult:
        """The variant of that name.

        Raises:
            ConfigError: there is none.
        """
        for variant in self.variants:
            if variant.name == name:
                return variant
        names = ", ".join(variant.name for variant in self.variants)
        raise ConfigError(f"no variant {name!r} in these results; there are {names}")


def write(results: Results, path: str | Path) -> None:
    """Writes the file, which is complete or absent.

    Raises:
        ConfigError: a number is not finite, where it is none that may be infinite (`Number`).
    """
    write_finite(asdict(results), path)


def write_finite(
    tree: dict[str, Any], path: str | Path, unbounded: AbstractSet[str] = _UNBOUNDED
) -> None:
    """Writes results of any schema.

    Args:
        unbounded: keys below which a number may be infinite, beside a perplexity itself.

    Raises:
        ConfigError: as `write`.
    """
    for place, value in numbers(tree):
        may_be_infinite = place[-1] == "perplexity" or not unbounded.isdisjoint(place)
        if math.isnan(value) or (math.isinf(value) and not may_be_infinite):
            raise ConfigError(f"{path} was not written: {'.'.join(place)} is {value}; {NOT_FINITE}")
    write_json(path, tree)


def is_results(path: str | Path, schema: str = SCHEMA) -> bool:
    """Whether a file holds results, of whichever version of the schema."""
    try:
        tree = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    family = schema.partition("/")[0]
    return isinstance(tree, dict) and str(tree.get("schema")).partition("/")[0] == family


def read(path: str | Path) -> Results:
    """Reads a results file.

    Raises:
        ConfigError: it is missing, no JSON, of another schema, or lacks or misuses a key.
    """
    return read_as(Results, SCHEMA, path)


def read_as(kind: type[Whole], schema: str, path: str | Path) -> Whole:
    """Reads a file of results of the schema whose whole is a `kind`; errors as of `read`."""
    try:
        tree = json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=_refused)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict) or "schema" not in tree:
        raise ConfigError(
            f"{path} names no schema: it is no results file, or of a version before there were "
            "any; evaluate again (idp-jax eval)"
        )
    if tree["schema"] != schema:
        raise ConfigError(
            f"{path}: schema {tree['schema']!r} is not {schema}; read it with the version of "
            "idp-jax that wrote it, or evaluate again"
        )
    return from_dict(kind, tree, str(path))


def _refused(constant: str) -> None:
    raise ValueError(f"{constant} is no number")


def numbers(tree: Any, place: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], float]]:
    """Every float of a tree, with the keys on the way to it."""
    if isinstance(tree, float):
        yield place, tree
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield from numbers(value, (*place, str(key)))
    elif isinstance(tree, list | tuple):
        for index, value in enumerate(tree):
            yield from numbers(value, (*place, str(index)))
