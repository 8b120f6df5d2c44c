"""Scores of the harness's own Hugging Face backend and ours, on the same published items."""

import warnings

import lm_eval
import pytest

torch = pytest.importorskip("torch")

from idp_jax import load_model, load_tokenizer
from idp_jax.evaluation.harness import HarnessLM
from idp_jax.evaluation.task_data import local_tasks, task_manager
from tests.datasets import DATA, needs_data
from tests.helpers import tiny_folder

TASKS = [
    "arc_easy",
    "sciq",
    "webqs",
    "triviaqa",
    "piqa",
    "hellaswag",
    "lambada_openai",
    "winogrande",
    "commonsense_qa",
    "wikitext",
    "bear",
]
ITEMS = 3
# Sums over whole continuations; single tokens agree to about 1e-5.
PER_TOKEN = 1e-3


def answers(model, tasks) -> dict:
    """By task, the responses to every request and the metrics."""
    found = lm_eval.simple_evaluate(
        model=model,
        tasks=local_tasks(tasks, DATA, limit=ITEMS),
        task_manager=task_manager(),
        limit=ITEMS,
        bootstrap_iters=0,
    )
    return {
        task: (
            [
                (row["arguments"], row["resps"])
                for row in sorted(rows, key=lambda row: row["doc_id"])
            ],
            found["results"][task],
        )
        for task, rows in found["samples"].items()
    }


@pytest.fixture(scope="module", params=["llama", pytest.param("opt", marks=pytest.mark.slow)])
def folder(request, tmp_path_factory):
    """Random, so the protocol is measured: rows of bytes are long, and some are cut at 512."""
    path = tmp_path_factory.mktemp("model") / request.param
    return tiny_folder(path, request.param, max_positions=1024)


@pytest.fixture(scope="module")
def theirs(folder):
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the backend's own use of torch and transformers
        backend = HFLM(
            pretrained=model,
            tokenizer=load_tokenizer(folder),
            batch_size=4,
            max_length=512,
            device="cpu",
        )
        return answers(backend, TASKS)


def same_response(ours, theirs, tokens: int) -> None:
    if isinstance(theirs, str):
        assert ours == theirs
    elif isinstance(theirs, tuple):
        assert ours == (pytest.approx(theirs[0], abs=PER_TOKEN * tokens), theirs[1])
    else:
        assert ours == pytest.approx(theirs, abs=PER_TOKEN * tokens)


@needs_data
def test_same_answers_on_every_task(folder, theirs):
    batch_size = 1 if folder.name == "opt" else 8
    tokenizer = load_tokenizer(folder)
    harness = HarnessLM(load_model(folder), tokenizer, batch_size, max_length=512)
    # Another order of tasks is another order of requests.
    ours = answers(harness, TASKS[:: -1 if batch_size == 1 else 1])
    for task, (rows, metrics) in theirs.items():
        for (arguments, expected), (same_arguments, found) in zip(rows, ours[task][0], strict=True):
            assert arguments == same_arguments
            for argument, x, y in zip(arguments, found, expected, strict=True):
                tokens = len(str(argument[-1]).encode())  # a byte-level model
                same_response(x[0], y[0], tokens)
        for name, value in metrics.items():
            same = pytest.approx(value, rel=1e-4) if isinstance(value, float) else value
            assert ours[task][1][name] == same
