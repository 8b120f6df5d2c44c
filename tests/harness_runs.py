"""Runs of the harness's own `dummy` model, written by the harness itself.

    folder = harness_run(tmp_path, seed=1)     # a folder as lm_eval --log_samples writes it

tests/golden/harness_0.5 holds two such runs of version 0.5.0.dev1: `python -m tests.harness_runs`,
with that version of lm_eval in front of ours on PYTHONPATH.
"""

import json
import random
from pathlib import Path

ITEMS = 40
_COMMON = {"test_split": "test", "metadata": {"version": 1.0}}
TASKS = {
    "toy": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{options}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "toy_answers": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{options[answer]}}",
        "generation_kwargs": {"until": ["\n"]},
        "filter_list": [
            {"name": name, "filter": [{"function": "take_first"}]} for name in ("strict", "loose")
        ],
        "metric_list": [{"metric": "exact_match"}],
    },
    "toy_text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
}


def rows() -> list[dict]:
    """Questions of eight relations, four options each, of which two have the text of another."""
    draw = random.Random(0)
    found = [
        {
            "question": f"Question {number}?",
            "options": ["lol", f"b{number}", f"c{number}", f"d{number}"],
            "answer": draw.randrange(4),
            "relation": f"P{number % 8}",
        }
        for number in range(ITEMS - 1)
    ]
    return [*found, found[0]]  # data sets do hold a question twice


def harness_run(out: Path, seed: int, limit: int | None = None, names=tuple(TASKS)) -> Path:
    """Scores the dummy model and has the harness write results and samples."""
    import datasets
    import lm_eval
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.tasks import TaskManager

    data = lambda **_: {"test": datasets.Dataset.from_list(rows())}
    tasks = [{"task": name, "custom_dataset": data, **_COMMON, **TASKS[name]} for name in names]
    tracker = EvaluationTracker(output_path=str(out))
    options = {"bootstrap_iters": 0, "log_samples": True, "limit": limit}
    options["task_manager"] = TaskManager(include_defaults=False)
    found = lm_eval.simple_evaluate(model="dummy", tasks=tasks, random_seed=seed, **options)
    samples = found.pop("samples")
    tracker.save_results_aggregated(results=found, samples=samples)
    for name, items in samples.items():
        tracker.save_results_samples(task_name=name, samples=items)
    return out


def _keep(file: Path, names=("results", "versions", "n-shot", "model_name")) -> None:
    """Leaves out of the harness's results what they say of the machine."""
    found = json.loads(file.read_text())
    file.write_text(json.dumps({name: found[name] for name in names}, indent=2) + "\n")


if __name__ == "__main__":
    for number in (1, 2):
        place = Path(__file__).parent / "golden" / "harness_0.5" / f"run_{number}"
        harness_run(place, number)
        _keep(next(place.rglob("results_*.json")))
