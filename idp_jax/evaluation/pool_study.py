"""`idp-jax pool-study`: does choosing a prompt for every input help?

Every prompt of the pool answers every item once, and every selector looks at every input once; all
policies are then a matter of arithmetic (`pool_results.judge`). Four measures: `text` is what
`eval` does, the prompt chosen from the window that it is scored on; `continuation` chooses from a
window's first half and scores the second, so that it can be lived by, and has the transferable
oracle (the prompt that was best on the first half); `accuracy` and `margin` are of questions.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from idp_jax import formats
from idp_jax.config import ConfigError, PoolStudy
from idp_jax.config.files import to_dict
from idp_jax.evaluation import cost, pool_results
from idp_jax.evaluation.job import Inputs, claimed, code_of, journal_of, prompt_lengths, read_inputs
from idp_jax.evaluation.journal import Journal
from idp_jax.evaluation.pool_results import Asked, Cost, Measure, Outcome, Study, judge
from idp_jax.evaluation.selection_statistics import log_mean
from idp_jax.formats.adapters import read_adapter
from idp_jax.formats.source import open_config
from idp_jax.jobs.machine import describe
from idp_jax.jobs.progress import SILENT, Progress
from idp_jax.models.abstract import abstract
from idp_jax.models.config import from_hf
from idp_jax.processes import first_process
from idp_jax.recover import Repaired
from idp_jax.recover.selection import find_selector
from idp_jax.recover.selectors import SELECTORS
from idp_jax.sharding import shard

OWN, ENSEMBLE, BARE, TRANSFER = "own", "ensemble", "no prompt", "best on first half"
_CONTROLS = ("random", "fixed", "first")  # rows of every table as it is


def study(settings: PoolStudy, *, progress: Progress = SILENT) -> Study:
    """Studies a pool as the settings ask, and writes what was found.

    Raises:
        ConfigError: settings that do not fit the model or the pool.
        ValueError: the model, an adapter, a task, a selector or the text cannot be used.
    """
    names = settings.selector or default_selectors()
    for name in names:
        find_selector(name)
    with claimed(settings.out, settings.overwrite, settings.mesh, pool_results.is_study) as mesh:
        settings = replace(settings, dtype=settings.dtype or formats.default_dtype())
        tokenizer = formats.load_tokenizer(settings.model)
        inputs = read_inputs(settings, tokenizer)
        if inputs.tasks:
            from idp_jax.evaluation.pool_runs import check_tasks  # the harness, some seconds

            check_tasks(inputs.tasks)
        outline = abstract(from_hf(open_config(settings.model)))
        folders = [settings.adapter, *settings.baseline]
        adapters = [read_adapter(outline, folder) for folder in folders]
        _check(settings, outline, adapters, inputs)
        journal = journal_of(settings, settings.out, folders)
        model = formats.load_model(
            settings.model, **settings.held, mesh=mesh, progress=progress.tracker("loading")
        )
        pool, *baselines = (shard(adapter, mesh).repair(model) for adapter in adapters)
        runs = _Runs(settings, tokenizer, inputs, Repaired.of(model), pool, baselines, names)
        runs.progress, runs.journal = progress, journal
        found = runs.study()
        first_process(lambda: pool_results.write(found, settings.out), "results")
        journal.remove()
    return found


def default_selectors() -> tuple[str, ...]:
    """The built-in selectors that have no parameters, controls left out."""
    free = (name for name, target in SELECTORS.items() if not isinstance(target, type))
    return tuple(name for name in free if name not in _CONTROLS)


def _check(settings: PoolStudy, outline: Any, adapters: list, inputs: Inputs) -> None:
    """Refuses what is no pool, and windows that do not fit behind an adapter."""
    shapes = [jax.eval_shape(adapter.repair, outline) for adapter in adapters]
    prefix = shapes[0].prefix
    if prefix is None or prefix.batch < 2:
        raise ConfigError(f"--adapter {settings.adapter} is no pool of two prompts or more")
    if inputs.windows is not None:
        for shape in shapes:
            outline.check(inputs.windows, shape.prefix)
        if inputs.windows.shape[1] < 4:
            raise ConfigError(
                f"--sequence-length {inputs.windows.shape[1]} leaves no two halves; give 4 or more"
            )


@dataclass
class _Runs:
    """One study at work; see `study`."""

    settings: PoolStudy
    tokenizer: Any
    inputs: Inputs
    bare: Repaired
    pool: Repaired
    baselines: list[Repaired]
    names: tuple[str, ...]
    progress: Progress = SILENT
    journal: Journal = field(default_factory=Journal)

    def __post_init__(self):
        prefix, own = self.pool.prefix, self.pool.selector
        self.prompts = 0 if prefix is None else prefix.batch
        self.selectors = {name: self.pool.with_selector(name) for name in self.names}
        if own is not None and own.name not in self.selectors:
            name = OWN if own.name is None else f"{OWN}: {own.name}"
            self.selectors = {name: self.pool, **self.selectors}

    def study(self) -> Study:
        measures, inputs = [], []
        for part in (self._text, self._questions):
            found, read = part()
            measures, inputs = measures + found, inputs + read
        return Study(
            config=to_dict(self.settings),
            environment=describe(),
            prompt_lengths=prompt_lengths(self.pool),
            cache_bytes=_bytes(self.pool.prefix),
            measures=measures,
            **self._costs(sorted(inputs, key=len)[len(inputs) // 2]),
        )

    def _others(self) -> dict[str, Repaired]:
        """What chooses none of the prompts, by name."""
        names = (str(path) for path in self.settings.baseline)
        return {BARE: self.bare, **dict(zip(names, self.baselines, strict=True))}

    def _singles(self) -> list[Repaired]:
        from idp_jax.evaluation.pool_runs import single

        return [single(self.pool, number) for number in range(self.prompts)]

    def _scores(self, inputs: list) -> dict[str, np.ndarray]:
        """Every selector's scores of the same texts."""
        from idp_jax.evaluation.pool_runs import score_inputs

        found = {}
        for name, repaired in self.selectors.items():
            code = code_of(getattr(repaired.selector, "name", None))
            journal = self.journal.within("choice", name, code)
            size = self.settings.batch_size
            found[name] = score_inputs(repaired, inputs, size, name, self.progress, journal)
        return found

    def _text(self) -> tuple[list[Measure], list[list[int]]]:
        """Measures of windows: chosen from the whole, and from the first half."""
        if self.inputs.windows is None:
            return [], []
        from idp_jax.evaluation.pool_runs import read_windows, segment_starts

        windows, size = self.inputs.windows, self.settings.batch_size
        read = lambda name, models: read_windows(
            models,
            windows,
            min(size, len(windows)),
            self.progress.tracker(name),
            self.journal.within("windows", name),
        )
        sums, ensemble = read("prompts", self._singles())
        others = {ENSEMBLE: ensemble}
        others |= {name: read(name, [model])[0][:, 0] for name, model in self._others().items()}
        starts = segment_starts(windows.shape[1] - 1)
        counts = np.diff([*starts, windows.shape[1] - 1])
        names = [f"tokens {a + 2}-{a + 1 + n}" for a, n in zip(starts, counts, strict=True)]

        def measure(name: str, first: int, scores: dict[str, np.ndarray]) -> Measure:
            weights = counts[first:]
            per_token = lambda x: Outcome(
                x[..., first:].sum(-1) / weights.sum(), x[..., first:] / weights
            )
            found = {key: per_token(value) for key, value in others.items()}
            asked = Asked(name, "nats per token", names[first:], per_token(sums), found)
            return judge(asked, scores, self.settings.seed)

        half = len(counts) // 2
        begun = windows[:, : starts[half] + 1]  # what the second half's first token follows
        transfer = {TRANSFER: sums[..., :half].sum(-1)}
        measures = [
            measure("text", 0, self._scores(list(windows))),
            measure("continuation", half, {**self._scores(list(begun)), **transfer}),
        ]
        return measures, windows.tolist()

    def _questions(self) -> tuple[list[Measure], list[list[int]]]:
        """Measures of multiple choice: right or wrong, and by how much."""
        if not self.inputs.tasks:
            return [], []
        from idp_jax.evaluation import pool_runs

        others = self._others()
        models = {str(number): model for number, model in enumerate(self._singles())}
        every = {**models, **others}
        limit = pool_runs.text_limit([*every.values()], self.tokenizer, self.settings.max_length)
        answers, choosers = {}, {}
        for name, model in every.items():
            journal = self.journal.within("questions", name)
            asked = (self.tokenizer, self.inputs.tasks, self.settings, limit)
            answers[name], choosers = pool_runs.ask(model, *asked, self.progress, journal)
        places = sorted(set.intersection(*(set(found) for found in answers.values())))
        places = [place for place in places if place in choosers]
        if not places:
            raise ValueError("no item can be scored under every prompt")
        inputs = [list(choosers[place]) for place in places]
        bins, members = pool_results.length_bins([len(row) for row in inputs])
        spread = lambda x: Outcome(
            x, np.where(members if x.ndim == 1 else members[:, None], x[..., None], np.nan)
        )
        table = lambda what: {
            name: np.asarray([what(found[place]) for place in places])
            for name, found in answers.items()
        }
        stacked = lambda found: np.stack([found[name] for name in models], 1)
        margins = table(lambda answer: pool_runs.margin(answer.logprobs, answer.gold))
        right = table(lambda answer: answer.right)
        mixed = np.asarray([self._ensemble_margin(answers, models, place) for place in places])
        scores, measures = self._scores(inputs), []
        for name, unit, values, together in (
            ("accuracy", "share right", right, (mixed > 0).astype(float)),
            ("margin", "nats over the likeliest wrong answer", margins, mixed),
        ):
            rest = {ENSEMBLE: together} | {key: values[key] for key in others}
            outcomes = {key: spread(value) for key, value in rest.items()}
            latent = stacked(margins) if name == "accuracy" else None
            asked = Asked(name, unit, bins, spread(stacked(values)), outcomes, latent)
            measures.append(judge(asked, scores, self.settings.seed))
        return measures, inputs

    @staticmethod
    def _ensemble_margin(answers: dict, models: dict, place: tuple) -> float:
        """The margin where an answer's probability is its mean over the prompts."""
        from idp_jax.evaluation.pool_runs import margin

        each = [answers[name][place] for name in models]
        mixed = log_mean(np.asarray([answer.logprobs for answer in each]), 0)
        return margin(mixed.tolist(), each[0].gold)

    def _costs(self, tokens: list[int]) -> dict[str, Any]:
        """Of every selector on one input, beside the model's own pass of it."""
        from idp_jax.evaluation.pool_runs import choice_scores, single

        ids = jnp.asarray([tokens], jnp.int32)
        mask, one = jnp.ones_like(ids), single(self.pool, 0)
        own = cost.multiplications(_pass, one, ids)
        costs = {}
        for name, repaired in self.selectors.items():
            share = cost.multiplications(choice_scores, repaired, ids, mask) / own
            took = cost.median_ms(choice_scores, repaired, ids, mask)
            costs[name] = Cost(share, took, _bytes(repaired.selector))
        pass_ms = cost.median_ms(_pass, one, ids)
        return {"costs": costs, "cost_tokens": len(tokens), "pass_ms": pass_ms}


@jax.jit
def _pass(repaired: Repaired, ids) -> jax.Array:
    return repaired.decoder.hidden(ids, past=repaired.prefix)


def _bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
