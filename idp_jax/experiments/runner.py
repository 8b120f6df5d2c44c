"""Goes through the stages of an experiment: text, compression, training, measurement, comparison.

Killed and started again, it goes on behind the last stage that left its result.
"""

from collections.abc import Callable
from functools import lru_cache

from idp_jax import formats
from idp_jax.analysis.figures import comparison as draw
from idp_jax.config import Experiment
from idp_jax.config.files import to_dict
from idp_jax.evaluation.comparison import compare
from idp_jax.evaluation.results import Comparison, Results, VariantResult, write
from idp_jax.experiments import stages
from idp_jax.experiments.measured import measured
from idp_jax.jobs.folder import check_writable, run_folder
from idp_jax.jobs.machine import describe
from idp_jax.jobs.progress import SILENT, Progress

_CHANCE = {"knowledge": 0.25}  # of tasks whose questions all have as many answers
# An experiment may grow: every folder below holds its own settings, and refuses others.
_FREE = (
    *("out", "cache_teacher", "compressions", "adapters", "variants"),
    *("tasks", "task_data", "items", "latency", "timing"),
)


def run(
    settings: Experiment,
    *,
    progress: Progress = SILENT,
    begin: Callable[[str], None] = lambda stage: None,
) -> Results:
    """Runs what is not yet done.

    Args:
        begin: called with the name of every stage before it, done or not.

    Returns:
        The contents of results.json, beside which figure.png is drawn.

    Raises:
        CheckpointError: there is no such model.
        ConfigError: recipes that cannot be used, or the folder holds another experiment.
    """
    stages.check(settings)
    inputs = stages.inputs(settings)  # a model that is not there leaves no folder behind
    check_writable(settings.out, stages.needed(settings))
    with run_folder(settings.out, settings, free=_FREE, inputs=inputs):
        return _run(settings, progress, begin)


def _run(settings: Experiment, progress: Progress, begin: Callable[[str], None]) -> Results:
    @lru_cache(maxsize=1)  # variants of one model stand together; two models may not fit
    def load(compression: str | None):
        path = stages.model_of(settings, compression)
        return formats.load_model(path, weights="auto", progress=progress.tracker("loading"))

    begin("text")
    stages.write_texts(settings, lambda: load(None), progress)
    for name in settings.compressions:
        begin(f"compression: {name}")
        stages.compressed(settings, name, progress)
    for (compression, name), variant in stages.adapters(settings).items():
        begin(f"adapter: {name} on {compression or 'dense'}")
        stages.trained(settings, variant, progress)
    tokenizer = formats.load_tokenizer(settings.model)
    variants, second = [], []
    for variant in settings.rows:
        begin(f"evaluation: {variant.name}")
        model = lambda variant=variant: load(variant.compression)
        found, *others = measured(settings, variant, model, tokenizer, progress)
        variants.append(found)
        second += others
    results = Results(
        config=to_dict(settings),
        environment=describe(),
        variants=variants + second,
        comparisons=_comparisons(settings, variants),
    )
    write(results, settings.out / "results.json")
    chance = _CHANCE.get(settings.tasks)
    draw(variants, settings.title, settings.out / "figure.png", chance=chance)
    return results


def _comparisons(settings: Experiment, variants: list[VariantResult]) -> list[Comparison]:
    """Each variant against its reference, where there is one."""
    by_name = {variant.name: variant for variant in variants}
    found = []
    for variant in settings.rows:
        reference = settings.reference(variant)
        if reference is not None:
            pair = by_name[reference.name], by_name[variant.name]
            found.append(compare(*pair, seed=settings.seed))
    return found
