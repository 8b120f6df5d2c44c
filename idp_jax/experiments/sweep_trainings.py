"""The trainings of a sweep: how many there are, how long they take, and what each came to.

The invariant: a training that diverges is a result, not an error: it counts as a trial, and is not
run again.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from idp_jax import training
from idp_jax.config import ConfigError, Sweep, Train
from idp_jax.config.files import to_dict
from idp_jax.evaluation.sweep_results import Trial
from idp_jax.jobs.files import read_json, write_json
from idp_jax.jobs.folder import differences
from idp_jax.jobs.progress import Progress, counted
from idp_jax.recover.methods import METHODS
from idp_jax.training.done import inputs


class Plan(NamedTuple):
    """What a sweep trains.

    Attributes:
        trainings, tokens: in all; a pool's prompts count for themselves.
        line: the same for people.
    """

    trainings: int
    tokens: int
    line: str


def plan(settings: Sweep) -> Plan:
    """What a sweep trains at most: two compressions may choose one rate, and share a control."""
    recipes, models = len(settings.recipes), len(settings.compressions)
    rates = len(settings.rates(next(iter(settings.recipes))))
    repeats = len(settings.seeds) + settings.dense_controls
    tokens = sum(
        _tokens(settings, name, settings.trial_tokens) * rates
        + _tokens(settings, name, settings.tokens) * repeats
        for name in settings.recipes
    )
    control = ", one more beside the uncompressed model" if settings.dense_controls else ""
    line = (
        f"{recipes * models * (rates + repeats)} trainings, {models * tokens:,} tokens: on "
        f"{counted(models, 'compressed model')}, each {counted(recipes, 'recipe')} at "
        f"{counted(rates, 'learning rate')} with {settings.trial_tokens:,} tokens, then "
        f"{counted(len(settings.seeds), 'seed')} with {settings.tokens:,}{control}"
    )
    return Plan(recipes * models * (rates + repeats), models * tokens, line)


def _tokens(settings: Sweep, recipe: str, budget: int) -> int:
    """Tokens of a training, whose steps are whole; each prompt of a pool has them."""
    step = settings.batch_size * settings.data.sequence_length
    rate, data = settings.rates(recipe)[0], {"sequence_length": settings.data.sequence_length}
    folder = settings.out / "trials"
    config = settings.training(recipe, rate, settings.model, folder, data=data, tokens=budget)
    return budget // step * step * len(METHODS[config.method].runs(config))


@dataclass(frozen=True)
class Trained:
    """What a training came to.

    Attributes:
        folder: of the run.
        result: of `train`; None where it diverged.
        seconds: that it took, in all calls.
        trial: the same as a trial.
    """

    folder: Path
    result: dict[str, Any] | None
    seconds: float
    trial: Trial


class Trainings:
    """Trains one thing after the other, and says how many are left and for how long."""

    def __init__(self, settings: Sweep, progress: Progress, say: Callable[[str], None]):
        self._progress, self._say = progress, say
        self._plan = plan(settings)
        self._number, self._left = 0, self._plan.tokens
        self._timed_tokens, self._timed_seconds = 0, 0.0

    def train(self, config: Train, name: str) -> Trained:
        """Trains what is not yet trained; see `Trained`."""
        self._number += 1
        tokens = config.tokens * len(METHODS[config.method].runs(config))
        self._say(f"[{self._number}/{self._plan.trainings}] {name}{self._expected()}")
        record = Path(config.out).with_name(f"{Path(config.out).name}.json")
        asked, known = to_dict(config), _known(record)
        same = not differences(known.get("config"), asked, ())
        said = known.get("diverged") if same and known.get("inputs") == inputs(config) else None
        result = None
        if said is None:
            with self._timed(record, known, asked, tokens) as note:
                try:
                    result = training.train(config, progress=self._progress)
                except training.Diverged as error:
                    note |= {"diverged": str(error), "inputs": inputs(config)}
                    self._say(f"  {error}")
        self._left -= tokens
        trial = _trial(config.learning_rate, result, Path(config.out))
        return Trained(Path(config.out), result, _known(record).get("seconds", 0.0), trial)

    @contextmanager
    def _timed(
        self, record: Path, known: dict[str, Any], asked: dict[str, Any], tokens: int
    ) -> Iterator[dict[str, Any]]:
        """Adds the time to that of earlier calls; only looking at a finished training takes none.

        A call that is killed leaves no time: the sum is what it took at least.
        """
        note: dict[str, Any] = {"config": asked, "seconds": known.get("seconds", 0.0)}
        was_done, started = (record.with_suffix("") / "result.json").is_file(), time.monotonic()
        try:
            yield note
        finally:
            if not was_done:
                took = time.monotonic() - started
                self._timed_tokens += tokens
                self._timed_seconds += took
                write_json(record, {**note, "seconds": note["seconds"] + took})

    def _expected(self) -> str:
        """How long what is left will take, as soon as one training has been timed."""
        if not self._timed_tokens:
            return ""
        hours = self._timed_seconds / self._timed_tokens * max(self._left, 0) / 3600
        return f" (about {hours:.1f} hours left)"


def _known(record: Path) -> dict[str, Any]:
    """What an earlier call noted of a training."""
    if not record.is_file():
        return {}
    remedy = f"remove {record}, and the same command goes on"
    found = read_json(record, remedy)
    if not isinstance(found.get("seconds", 0.0), int | float):
        raise ConfigError(f"{record} is damaged (seconds is {found['seconds']!r:.50}); {remedy}")
    return found


def _trial(rate: float, result: dict[str, Any] | None, folder: Path) -> Trial:
    """A pool's loss is the mean of its prompts'.

    Raises:
        ConfigError: the result in the folder lacks a number.
    """
    if result is None:
        return Trial(rate, math.inf)
    parts = result.get("prompts", [result])
    try:
        loss = sum(part["validation_loss"] for part in parts) / len(parts)
        return Trial(rate, loss, max(part["best_step"] for part in parts))
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise ConfigError(
            f"{folder / 'result.json'} is damaged (it has no validation_loss and best_step of each "
            "prompt); remove it, and the same command goes on from the last checkpoint"
        ) from error
