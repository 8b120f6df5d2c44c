"""A training run: from a configuration to an adapter folder, or on from where it was interrupted.

The run's folder holds config.yaml (resolved), metrics.jsonl, timing.jsonl, checkpoints/,
self_text.jsonl and its digest where the model wrote its own text, and at the end adapter/ (of the
best validation), last/ (of the last step) and result.json. A pool trains its prompts one after the
other, each in a folder below.
"""

from collections.abc import Callable
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax

from idp_jax import formats
from idp_jax.config import ConfigError, Train, url_of
from idp_jax.config.files import to_dict
from idp_jax.data.ahead import Ahead
from idp_jax.data.sources import SELF
from idp_jax.data.stream import TrainingText
from idp_jax.formats import save_adapter
from idp_jax.jobs.chips import chip_here
from idp_jax.jobs.files import contents, seal, write_json
from idp_jax.jobs.folder import check_absent, check_writable, run_folder
from idp_jax.jobs.machine import describe
from idp_jax.jobs.progress import SILENT, Progress, expecting
from idp_jax.jobs.remote import working
from idp_jax.models.decoder import Decoder
from idp_jax.processes import first_process, gather, mesh_of
from idp_jax.recover.methods import METHODS, Adapter, Run, parameter_count
from idp_jax.sharding import batch_parts, share
from idp_jax.training.checkpoint import Checkpointer
from idp_jax.training.checks import check
from idp_jax.training.clusters import part_of
from idp_jax.training.done import ADAPTERS, finished, inputs, needed
from idp_jax.training.goodput import Goodput
from idp_jax.training.interruption import stopping_together
from idp_jax.training.loop import fit
from idp_jax.training.objectives import make_objective
from idp_jax.training.plan import measured_rate, planned, useful
from idp_jax.training.profile import Profile
from idp_jax.training.sinks import make_sinks, where
from idp_jax.training.starts import resolved, starts
from idp_jax.training.step import make_optimizer, make_schedule
from idp_jax.training.teacher import Teacher
from idp_jax.training.text import open_text, self_text

# What may change between two calls that work on the same run: it does not change what is trained.
_FREE = ("out", "mesh", "passes", "remat", "evaluate_every", "checkpoint_every", "tracking", "plan")
_FREE += ("keep_checkpoints", "profile", "teacher.cache")


def train(
    config: Train,
    *,
    progress: Progress = SILENT,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Trains what the configuration asks for.

    Args:
        say: told the budget before the work, the memory and the time that it will take before the
            first step, and how long it will take after its first steps.

    Returns:
        The contents of result.json: validation loss and perplexity, best and last step, whether
        patience ended it, extra parameters, tokens, device and versions, and "time", what that of
        this call went to (see `Goodput.summary`).

    Raises:
        ConfigError: the folder holds a run with another configuration.
        ValueError: the model or the text cannot be used, or training diverged.
    """
    mesh = mesh_of(config.mesh)
    config = replace(config, dtype=config.dtype or formats.default_dtype())
    if url_of(config.out) is not None and jax.process_count() > 1:
        raise ConfigError(
            f"--out {url_of(config.out)} is a URL, and several processes write into one folder; "
            "mount the bucket (gcsfuse, s3fs) and give its place there"
        )
    with ExitStack() as held, jax.set_mesh(mesh) if mesh is not None else nullcontext():
        out = held.enter_context(working(config.out))
        config = replace(config, out=out)
        parameters = check(config, mesh)
        conditions = _extensions(config)

        def begin() -> None:
            check_writable(out, needed(config))
            held.enter_context(run_folder(out, config, inputs=inputs(config), **conditions))

        first_process(begin, "claim")
        result = finished(config, conditions["free"])
        if result is not None:
            return result
        for name in ADAPTERS:
            first_process(partial(check_absent, out / name, overwrite=True), f"{name}'s folder")
        return _train(config, out, mesh, parameters, progress, say)


def _extensions(config: Train) -> dict[str, Any]:
    """What may differ from the run in the folder, and why others may not, as `claim` asks."""
    free, why = set(_FREE), {}
    if config.patience is not None:  # it counts validations
        free -= {"evaluate_every"}
        why["evaluate_every"] = "--patience counts validations"
    if config.data.train == SELF:
        why["tokens"] = "a longer run is written another text"
    elif config.optimizer.schedule != "constant":
        why["tokens"] = (
            "the learning rate falls over the whole budget; --optimizer.schedule constant does not"
        )
    else:
        free |= {"tokens"}
    return {"free": tuple(sorted(free)), "why": why}


def _train(
    config: Train, out: Path, mesh, parameters: int, progress: Progress, say: Callable
) -> dict[str, Any]:
    goodput = Goodput()
    tokenizer = formats.load_tokenizer(config.model)
    text = None
    if config.data.train != SELF:
        with goodput.spending("input"):
            text = open_text(config, out, str(config.data.train), tokenizer)
    teacher = Teacher(config, tokenizer, mesh=mesh, progress=progress)
    method = METHODS[config.method]
    runs = method.runs(resolved(config))
    say(_budget(config, [run.label for run in runs], parameters))
    say(where(config))
    with goodput.spending("loading"):
        decoder = formats.load_model(
            config.model,
            **config.held,
            use_sparse24=False,
            mesh=mesh,
            progress=progress.tracker("loading"),
        )
    if text is None:
        source = self_text(config, out, decoder, teacher, tokenizer, progress, say)
        text = open_text(config, out, source, tokenizer)
    keys = [jax.random.fold_in(jax.random.key(config.seed), n) for n in range(len(runs))]
    begun = starts(config, runs, keys, tokenizer, text, lambda: teacher.decoder)
    adapters = [run.init(decoder, start) for run, start in zip(runs, begun, strict=True)]
    del begun  # and with it the teacher, unless the objective asks for it
    teacher.release()
    trainings = _Trainings(config, decoder, teacher, text, mesh, progress, say, goodput)
    done = [trainings.fit(*each) for each in zip(runs, adapters, keys, strict=True)]
    bests, lasts, summaries = (list(parts) for parts in zip(*done, strict=True))
    windows = lambda count: text.first(count).tokens
    best, last = (method.combine(config, parts, decoder, windows) for parts in (bests, lasts))
    result = _result(config, best, summaries)
    result["time"] = goodput.summary(trainings.fastest)
    whole = {name: gather(adapter) for name, adapter in zip(ADAPTERS, (best, last), strict=True)}

    def write() -> None:
        for name, adapter in whole.items():
            save_adapter(adapter, out / name, decoder=decoder, base=config.model, overwrite=True)
            result[name] = contents(out / name)
        result["digest"] = seal(result)
        write_json(out / "result.json", result)

    first_process(write, "result")
    return result


def _result(config: Train, adapter: Adapter, summaries: list[dict[str, Any]]) -> dict[str, Any]:
    """What result.json says, but for the adapters' files."""
    steps = sum(summary["last_step"] for summary in summaries)
    return {
        "method": config.method,
        "extra_parameters": parameter_count(adapter),
        "training_tokens": steps * config.batch_size * config.data.sequence_length,
        **(summaries[0] if len(summaries) == 1 else {"prompts": summaries}),
        "config": to_dict(config),
        "environment": describe(),
    }


def _budget(config: Train, labels: list[str], parameters: int) -> str:
    """What a run will train, on what: one line."""
    data, steps = config.data, config.steps
    window = config.batch_size * data.sequence_length
    each = " each" if len(labels) > 1 else ""
    writer = config.teacher.model or f"{config.model} itself"
    source = f"text that {writer} writes" if data.train == SELF else data.train
    if not steps:
        start = f"the start of {' and '.join(labels)} ({parameters:,} parameters)"
        return f"{start} is kept as it is: no tokens are trained on, {source} is measured on"
    return (
        f"training {' and '.join(labels)} ({parameters:,} parameters): {steps:,} steps of "
        f"{config.batch_size} x {data.sequence_length:,} tokens{each}, "
        f"{steps * window * len(labels):,} tokens in all, of {source}"
    )


@dataclass
class _Trainings:
    """What the trainings of a run have in common.

    Attributes:
        goodput: what the time goes to.
        rate: operations a second of this machine, measured before the first training.
    """

    config: Train
    decoder: Decoder
    teacher: Teacher
    text: TrainingText
    mesh: jax.sharding.Mesh | None
    progress: Progress
    say: Callable[[str], None]
    goodput: Goodput
    rate: float | None = None

    @property
    def fastest(self) -> float | None:
        """Tokens a second at the devices' peak, where that is known."""
        chip = chip_here(jax.devices()[0].device_kind)
        if chip is None:
            return None
        devices = 1 if self.mesh is None else self.mesh.size
        return devices * chip.flops / useful(self.decoder.config, self.config.data.sequence_length)

    def fit(
        self, run: Run, start: Adapter, key: jax.Array
    ) -> tuple[Adapter, Adapter, dict[str, float]]:
        """One training: the best adapter, the last one, and the summary of `loop.fit`."""
        config, folder, lasts = self.config, Path(self.config.out) / run.folder, []
        own = share(config.batch_size, self.mesh)
        text = part_of(self.text, self.decoder, run.cluster, run.order)
        with ExitStack() as held:
            update = held.enter_context(self.progress.bar(f"training {run.label}", "steps"))
            report = expecting(update, f"training {run.label}", "steps", self.say)
            report = held.enter_context(stopping_together(report))
            sinks = [held.enter_context(closing(sink)) for sink in make_sinks(config, folder)]
            checkpointer = held.enter_context(
                Checkpointer(folder / "checkpoints", config.keep_checkpoints)
            )
            batches = text.batches(config.batch_size, None if own is None else own.rows)
            batches = held.enter_context(closing(Ahead(batches)))
            best, summary = fit(
                start,
                self.decoder,
                make_objective(config.objective, remat=config.remat),
                make_optimizer(config.optimizer, config.learning_rate, config.steps),
                batches,
                text.validation_batches(config.windows_at_once, batch_parts(self.mesh)),
                steps=config.steps,
                evaluate_every=config.evaluate_every,
                checkpoint_every=config.checkpoint_every,
                patience=config.patience,
                sinks=sinks,
                schedule=make_schedule(config.optimizer, config.learning_rate, config.steps),
                passes=config.passes,
                checkpointer=checkpointer,
                attach=self.teacher.attach,
                key=key,
                mesh=self.mesh,
                share=own,
                progress=report,
                begin=partial(self._expect, run, start),
                keep_last=lasts.append,
                goodput=self.goodput,
                fastest=self.fastest,
                profile=Profile(folder / "profile", config.profile, self.say),
            )
        return best, lasts[0], summary

    def _expect(self, run: Run, adapter: Adapter, program: jax.stages.Compiled, steps: int) -> None:
        """Says what a training will take, once its step is compiled."""
        config, model = self.config, self.decoder.config
        if self.rate is None:
            tokens = config.batch_size * config.data.sequence_length
            self.rate = measured_rate(model, self.decoder.embedding.dtype, tokens)
        found = planned(config, run, model, adapter, program, steps, self.mesh, self.decoder)
        self.say(found.line(self.rate))
        warning = found.warning(config)
        if warning is not None:
            self.say(warning)
