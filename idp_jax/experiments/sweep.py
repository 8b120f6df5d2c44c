"""Runs a sweep: trials that choose a learning rate, seeds that are reported, measurements.

The folder holds text/, models/, trials/COMPRESSION/RECIPE/lr-RATE,
finals/COMPRESSION/RECIPE/seed-S, controls/RECIPE/lr-RATE and evaluation/; every training there is a
run of `train` with its own settings. The invariant: one model at a time is in memory (and its
teacher while it is trained beside one), and what is done is not done again.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from idp_jax import formats
from idp_jax.analysis.sweep_figure import draw_sweep
from idp_jax.compression.job import Job
from idp_jax.config import Compress, ConfigError, Sweep, Train
from idp_jax.config.files import from_dict, to_dict
from idp_jax.evaluation.job import read_inputs
from idp_jax.evaluation.sweep_results import RecipeResult, SweepResults, write_sweep
from idp_jax.experiments.held_out import (
    check_corpora,
    check_enough,
    held_out_files,
    is_split,
    write_held_out,
)
from idp_jax.experiments.once import compress_once
from idp_jax.experiments.sweep_measure import Measurements, Row
from idp_jax.experiments.sweep_rows import Measured, Scores, baseline, control_of, measured_recipe
from idp_jax.experiments.sweep_table import markdown
from idp_jax.experiments.sweep_trainings import Trained, Trainings, plan
from idp_jax.jobs.files import contents, fingerprint, write_text
from idp_jax.jobs.folder import check_writable, run_folder
from idp_jax.jobs.machine import describe
from idp_jax.jobs.progress import SILENT, Progress
from idp_jax.training.checks import check as check_training

_CALIBRATION_BATCH = 16  # windows
# A sweep may grow: every folder below holds its own settings, and refuses others.
_FREE = (
    *("out", "plan", "recipes", "learning_rates", "factors", "compressions", "seeds"),
    *("dense_controls", "reference", "tasks", "task_data", "items", "cache_teacher"),
)


def run_sweep(
    settings: Sweep,
    *,
    progress: Progress = SILENT,
    say: Callable[[str], None] = lambda line: None,
) -> SweepResults | None:
    """Runs what is not yet done.

    Args:
        say: told what will be trained, and each step before it.

    Returns:
        The contents of sweep.json, beside which sweep.md and sweep.png are written; None where
        only the plan was asked for.

    Raises:
        ConfigError: settings that cannot be used, or the folder holds another sweep.
        ValueError: the model or a text cannot be used.
    """
    check_sweep(settings)
    say(plan(settings).line)
    if settings.plan:
        return None
    check_writable(settings.out)
    with run_folder(settings.out, settings, free=_FREE, inputs=_inputs(settings)):
        return _run(settings, progress, say)


def check_sweep(settings: Sweep) -> None:
    """Refuses what cannot be done, before anything is compressed or trained.

    Raises:
        ConfigError: a compression, recipe, task or text that cannot be used.
        ValueError: sizes that do not fit the model.
    """
    formats.resolve(settings.model)
    check_corpora(settings.data)
    for name in settings.compressions:
        job = _compress(settings, name)
        if isinstance(job, Compress):
            Job(job)  # reads configurations alone
    for name in settings.recipes:
        _check_recipe(settings, name)
    tokenizer = formats.load_tokenizer(settings.model)
    read_inputs(Measurements.of_tasks(settings), tokenizer)
    if not is_split(settings.out):
        check_enough(settings.data, tokenizer)


def _check_recipe(settings: Sweep, name: str) -> None:
    """Holds a recipe against the uncompressed model, which has the sizes of the others."""
    data = _data(settings) | {"validation": str(settings.data.held_out)}
    asked = {"tokens": min(settings.trial_tokens, settings.tokens), "seed": settings.seed}
    folder = settings.out / "trials"
    for rate in settings.rates(name):
        config = settings.training(name, rate, settings.model, folder, data=data, **asked)
        if config.prefix.by_damage:  # which no model is there to tell yet
            if settings.dense_controls:
                raise ConfigError(
                    f"recipes.{name}: prefix.by_damage, and the uncompressed model has none; give "
                    "prefix.lengths, or no dense controls"
                )
            config = replace(config, prefix=replace(config.prefix, by_damage=False))
    check_training(config, None)


def _inputs(settings: Sweep) -> dict[str, dict[str, str]]:
    data, found = settings.data, {"model": fingerprint(formats.resolve(settings.model))}
    found["data.train"] = fingerprint(data.train)
    found["data.held-out"] = fingerprint(data.held_out)
    if data.second is not None:
        found["data.second"] = fingerprint(data.second)
    if settings.task_data is not None:
        found["task-data"] = contents(settings.task_data)
    return found


def model_of(settings: Sweep, compression: str | None) -> str:
    """The name or folder of the uncompressed model, or of a compressed one."""
    if compression is None:
        return settings.model
    job = _compress(settings, compression)
    return job if isinstance(job, str) else str(job.out)


def _compress(settings: Sweep, name: str) -> Compress | str:
    """How a model is compressed, or where it is already.

    Raises:
        ConfigError: a setting that is none, or out of range.
    """
    recipe, data = settings.compressions[name], settings.data
    if "model" in recipe:
        if len(recipe) > 1:
            raise ConfigError(
                f"compressions.{name}: {recipe['model']} is compressed already; give it alone, or "
                "settings of `compress`"
            )
        formats.resolve(str(recipe["model"]))
        return str(recipe["model"])
    common = {
        **to_dict(settings.compression),
        "model": settings.model,
        "out": settings.out / "models" / name,
        "calibration": data.train,
        "samples": data.calibration_windows,
        "sequence_length": data.sequence_length,
        "batch_size": _CALIBRATION_BATCH,
        "seed": settings.seed,
    }
    return from_dict(Compress, common | recipe, f"compressions.{name}")


def _data(settings: Sweep) -> dict:
    """What every training reads."""
    return {
        "train": settings.data.train,
        "validation": str(held_out_files(settings.out)["choosing"]),
        "validation_windows": settings.data.choosing_windows,
        "sequence_length": settings.data.sequence_length,
    }


def _run(settings: Sweep, progress: Progress, say: Callable[[str], None]) -> SweepResults:
    tokenizer = formats.load_tokenizer(settings.model)
    write_held_out(settings.data, tokenizer, settings.out)
    trainings = Trainings(settings, progress, say)
    rows: dict[tuple[str, str], RecipeResult] = {}
    finals: dict[tuple[str, str], list[Path]] = {}
    for name in settings.compressions:
        job = _compress(settings, name)
        if isinstance(job, Compress):
            say(f"compression: {name}")
            compress_once(job, progress)
        for recipe in settings.recipes:
            rows[name, recipe] = _tried(settings, trainings, name, recipe)
        for recipe in settings.recipes:
            key = name, recipe
            rows[key], finals[key] = _repeated(settings, trainings, rows[key])
    controls = _controls(settings, trainings, rows) if settings.dense_controls else {}
    results = _measured(settings, tokenizer, rows, finals, controls, progress, say)
    write_sweep(results, settings.out / "sweep.json")
    write_text(settings.out / "sweep.md", markdown(results))
    draw_sweep(results, settings.out / "sweep.png")
    return results


def _training(
    settings: Sweep, recipe: str, rate: float, compression: str | None, folder: Path, **asked
) -> Train:
    model = model_of(settings, compression)
    return settings.training(recipe, rate, model, folder, data=_data(settings), **asked)


def _tried(settings: Sweep, trainings: Trainings, compression: str, recipe: str) -> RecipeResult:
    """The trials of a recipe, and which learning rate they choose."""
    trials, rates = [], settings.rates(recipe)
    for rate in rates:
        folder = settings.out / "trials" / compression / recipe / f"lr-{rate!r}"
        asked = {"tokens": settings.trial_tokens, "seed": settings.seed}
        config = _training(settings, recipe, rate, compression, folder, **asked)
        trials.append(trainings.train(config, f"{recipe} on {compression}, rate {rate:g}").trial)
    best = min(trials, key=lambda trial: trial.loss)
    chosen = None if best.best_step is None else best.learning_rate
    return RecipeResult(
        compression=compression,
        recipe=recipe,
        trials=trials,
        chosen=chosen,
        edge=chosen in (rates[0], rates[-1]),
    )


def _repeated(
    settings: Sweep, trainings: Trainings, row: RecipeResult
) -> tuple[RecipeResult, list[Path]]:
    """The seeds of a recipe at its learning rate; the folders of those that did not diverge."""
    if row.chosen is None:
        return row, []
    found: dict[int, Trained] = {}
    for seed in settings.seeds:
        folder = settings.out / "finals" / row.compression / row.recipe / f"seed-{seed}"
        asked = {"tokens": settings.tokens, "seed": seed}
        config = _training(settings, row.recipe, row.chosen, row.compression, folder, **asked)
        found[seed] = trainings.train(config, f"{row.recipe} on {row.compression}, seed {seed}")
    done = {seed: each for seed, each in found.items() if each.result is not None}
    results = [each.result for each in done.values() if each.result is not None]
    numbers = {
        "seeds": list(done),
        "diverged": [seed for seed in found if seed not in done],
        "parameters": results[0]["extra_parameters"] if results else 0,
        "tokens": results[0]["training_tokens"] if results else 0,
        "seconds": sum(each.seconds for each in done.values()) / max(len(done), 1),
    }
    return replace(row, **numbers), [each.folder for each in done.values()]


def _controls(
    settings: Sweep, trainings: Trainings, rows: dict[tuple[str, str], RecipeResult]
) -> dict[tuple[str, float], Path]:
    """Each recipe beside the uncompressed model, once for each learning rate that was chosen."""
    found = {}
    for row in rows.values():
        if row.chosen is None or (row.recipe, row.chosen) in found:
            continue
        folder = settings.out / "controls" / row.recipe / f"lr-{row.chosen!r}"
        asked = {"tokens": settings.tokens, "seed": settings.seeds[0]}
        config = _training(settings, row.recipe, row.chosen, None, folder, **asked)
        done = trainings.train(config, f"{row.recipe} on dense, rate {row.chosen:g}")
        if done.result is not None:
            found[row.recipe, row.chosen] = done.folder
    return found


def _measured(
    settings: Sweep, tokenizer, rows, finals, controls, progress: Progress, say
) -> SweepResults:
    """Measures everything, model by model, and compares it."""
    measure = Measurements(settings, tokenizer, progress, say)
    tasks, seed = measure.tasks, settings.seed
    rows_of_dense: list[Row] = [("dense", "dense", None)]
    for (recipe, rate), folder in controls.items():
        rows_of_dense.append((f"dense + {recipe}, rate {rate:g}", "control", folder))
    dense, *beside = measure.all_of(settings.model, rows_of_dense)
    dense_scores = Scores.of([dense], tasks)
    compared = {
        key: control_of(found, dense_scores, tasks, seed)
        for key, found in zip(controls, beside, strict=True)
    }
    reference = settings.reference or next(iter(settings.recipes))
    baselines, recipes = [baseline("dense", dense_scores, seed)], []
    for name in settings.compressions:
        bare, repaired = _compressed_and_repaired(settings, measure, name, finals)
        bare_scores = Scores.of([bare], tasks)
        baselines.append(baseline(name, bare_scores, seed))
        first = repaired[reference]
        first_scores = Scores.of(first, tasks) if first else None
        for recipe, found in repaired.items():
            other = None if recipe == reference else first_scores
            row = measured_recipe(
                rows[name, recipe], found, dense_scores, bare_scores, other, tasks, seed
            )
            recipes.append(replace(row, control=compared.get((recipe, row.chosen))))
    return SweepResults(
        config=to_dict(settings),
        environment=describe(),
        reference=reference,
        baselines=baselines,
        recipes=recipes,
        variants=measure.variants,
    )


def _compressed_and_repaired(
    settings: Sweep, measure: Measurements, name: str, finals: dict[tuple[str, str], list[Path]]
) -> tuple[Measured, dict[str, list[Measured]]]:
    """A compressed model bare, and with every seed of each recipe."""
    asked: list[Row] = [(name, "compressed", None)]
    for recipe in settings.recipes:
        for run in finals[name, recipe]:
            asked.append((f"{name} + {recipe}, {run.name}", "repaired", run))
    bare, *found = measure.all_of(model_of(settings, name), asked)
    each = iter(found)
    return bare, {recipe: [next(each) for _ in finals[name, recipe]] for recipe in settings.recipes}
