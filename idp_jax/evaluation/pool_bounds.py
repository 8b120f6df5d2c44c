"""What a perfect choice among a pool's prompts would come to.

The invariant: an oracle knows the answers, so its numbers bound every selector from above and are
no result of any; `pool_study` says what noise alone would give it.
"""

from dataclasses import replace

import numpy as np

from idp_jax.evaluation.results import PerplexityResult, TaskResult, VariantResult
from idp_jax.evaluation.statistics import accuracy_interval, exponential, perplexity_interval


def oracle(prompts: list[VariantResult]) -> VariantResult:
    """The result of one pool whose prompt is the best of every item and of every window.

    Args:
        prompts: by prompt what was measured with it alone, on the same items; the result takes
            all that it does not choose from the first.
    """
    first = prompts[0]
    tasks = {name: _task([each.tasks[name] for each in prompts]) for name in first.tasks}
    texts = [each.perplexity for each in prompts if each.perplexity is not None]
    known = {name: task.metrics.get(task.accuracy or "") for name, task in tasks.items()}
    means = [value for value in known.values() if value is not None]
    return replace(
        first,
        tasks=tasks,
        groups={},
        mean_accuracy=float(np.mean(means)) if means else None,
        perplexity=_text(texts) if texts else None,
    )


def _task(prompts: list[TaskResult]) -> TaskResult:
    """Of the metrics those by item; where prompts answer alike, the first is taken."""
    first = prompts[0]
    if first.accuracy is None:
        return first
    chosen = np.argmax([each.samples[first.accuracy] for each in prompts], 0)
    samples = {
        name: [prompts[best].samples[name][item] for item, best in enumerate(chosen)]
        for name in first.samples
    }
    intervals = {name: accuracy_interval(samples[name]) for name in first.interval}
    return replace(
        first,
        metrics={name: float(np.mean(samples[name])) for name in first.interval},
        interval={name: (each.low, each.high) for name, each in intervals.items()},
        samples=samples,
        choices=np.bincount(chosen, minlength=len(prompts)).tolist(),
        prompts=None,
    )


def _text(prompts: list[PerplexityResult]) -> PerplexityResult:
    best = np.min([each.per_window_nll for each in prompts], 0).tolist()
    mean, interval = float(np.mean(best)), perplexity_interval(best)
    return replace(
        prompts[0],
        perplexity=exponential(mean),
        mean_nll=mean,
        per_window_nll=best,
        interval=None if interval is None else (interval.low, interval.high),
    )
