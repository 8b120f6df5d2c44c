"""A training run: from a configuration to an adapter folder, or on from where it was interrupted.

The run's folder holds config.yaml (resolved), metrics.jsonl, timing.jsonl, checkpoints/,
self_text.jsonl and its digest where the model wrote its own text, and at the end adapter/ (of the
best validation), last/ (of the last step) and result.json. A pool trains its prompts one after the
other, each in a folder below.
"""

from collections.abc import Callable
from contextlib import ExitStack, closing, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import jax

from idp_jax import formats
from idp_jax.config import Train
from idp_jax.config.files import to_dict
from idp_jax.data.sources import SELF
from idp_jax.data.stream import TrainingText
from idp_jax.formats import save_adapter
from idp_jax.jobs.files import contents, write_json
from idp_jax.jobs.folder import check_absent, check_writable, run_folder
from idp_jax.jobs.machine import describe
from idp_jax.jobs.progress import SILENT, Progress, expecting
from idp_jax.models.decoder import Decoder
from idp_jax.processes import first_process, gather, mesh_of
from idp_jax.recover.methods import METHODS, Adapter, Run, parameter_count
from idp_jax.training.checkpoint import Checkpointer
from idp_jax.training.checks import check
from idp_jax.training.clusters import part_of
from idp_jax.training.done import ADAPTERS, finished, inputs, needed
from idp_jax.training.loop import fit
from idp_jax.training.objectives import make_objective
from idp_jax.training.plan import measured_rate, planned
from idp_jax.training.sinks import make_sinks, where
from idp_jax.training.starts import resolved, starts
from idp_jax.training.step import make_optimizer, make_schedule
from idp_jax.training.teacher import Teacher
from idp_jax.training.text import open_text, self_text

# What may change between two calls that work on the same run: it does not change what is trained.
_FREE = ("out", "mesh", "evaluate_every", "checkpoint_every", "tracking", "plan")


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
        patience ended it, extra parameters, tokens, device and versions.

    Raises:
        ConfigError: the folder holds a run with another configuration.
        ValueError: the model or the text cannot be used, or training diverged.
    """
    out = Path(config.out)
    mesh = mesh_of(config.mesh)
    with ExitStack() as held, jax.set_mesh(mesh) if mesh is not None else nullcontext():
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
    tokenizer = formats.load_tokenizer(config.model)
    text = None
    if config.data.train != SELF:
        text = open_text(config, out, str(config.data.train), tokenizer)
    teacher = Teacher(config, tokenizer, mesh=mesh, progress=progress)
    method = METHODS[config.method]
    runs = method.runs(resolved(config))
    say(_budget(config, [run.label for run in runs], parameters))
    say(where(config))
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
    trained, lasts, summaries = [], [], []
    expect = _Expectation(config, decoder, mesh, say)
    for run, key, start in zip(runs, keys, adapters, strict=True):
        with progress.bar(f"training {run.label}", "steps") as update:
            update = expecting(update, f"training {run.label}", "steps", say)
            folder = out / run.folder
            begin = partial(expect, run, start)
            part = part_of(text, decoder, run.cluster, run.order)
            adapter, summary = _fit(
                *(config, start, decoder, teacher, part, folder, key, mesh, update),
                *(begin, lasts.append),
            )
        trained.append(adapter)
        summaries.append(summary)
    adapters = [method.combine(config, parts, decoder, text.first) for parts in (trained, lasts)]
    steps = sum(summary["last_step"] for summary in summaries)
    result = {
        "method": config.method,
        "extra_parameters": parameter_count(adapters[0]),
        "training_tokens": steps * config.batch_size * config.data.sequence_length,
        **(summaries[0] if len(summaries) == 1 else {"prompts": summaries}),
        "config": to_dict(config),
        "environment": describe(),
    }
    whole = {name: gather(adapter) for name, adapter in zip(ADAPTERS, adapters, strict=True)}

    def write() -> None:
        for name, adapter in whole.items():
            save_adapter(adapter, out / name, decoder=decoder, base=config.model, overwrite=True)
            result[name] = contents(out / name)
        write_json(out / "result.json", result)

    first_process(write, "result")
    return result


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


class _Expectation:
    """Says of each training what it will take, once its step is compiled."""

    def __init__(self, config: Train, decoder: Decoder, mesh, say: Callable[[str], None]):
        self._config, self._decoder, self._mesh, self._say = config, decoder, mesh, say
        self._rate: float | None = None

    def __call__(self, run: Run, adapter: Adapter, program: jax.stages.Compiled, steps: int):
        config, model = self._config, self._decoder.config
        if self._rate is None:
            tokens = config.batch_size * config.data.sequence_length
            self._rate = measured_rate(model, self._decoder.embedding.dtype, tokens)
        loaded = self._decoder
        found = planned(config, run, model, adapter, program, steps, self._mesh, loaded)
        self._say(found.line(self._rate))
        warning = found.warning(config)
        if warning is not None:
            self._say(warning)


def _fit(
    config: Train,
    start: Adapter,
    decoder: Decoder,
    teacher: Teacher,
    text: TrainingText,
    folder: Path,
    key: jax.Array,
    mesh: jax.sharding.Mesh | None,
    update: Callable[..., None],
    begin: Callable[..., None],
    keep_last: Callable[[Adapter], None],
) -> tuple[Adapter, dict[str, float]]:
    """One training with the parts that the configuration names; as `fit`."""
    with ExitStack() as held:
        sinks = [held.enter_context(closing(sink)) for sink in make_sinks(config, folder)]
        checkpointer = held.enter_context(Checkpointer(folder / "checkpoints"))
        return fit(
            start,
            decoder,
            make_objective(config.objective, remat=config.remat),
            make_optimizer(config.optimizer, config.learning_rate, config.steps),
            text.batches(config.batch_size),
            text.validation_batches(config.batch_size),
            steps=config.steps,
            evaluate_every=config.evaluate_every,
            checkpoint_every=config.checkpoint_every,
            patience=config.patience,
            sinks=sinks,
            schedule=make_schedule(config.optimizer, config.learning_rate, config.steps),
            checkpointer=checkpointer,
            attach=teacher.attach,
            key=key,
            mesh=mesh,
            progress=update,
            begin=begin,
            keep_last=keep_last,
        )
