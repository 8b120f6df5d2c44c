"""The public GPTQ implementation on SmolLM2: how far rounding alone moves its own figures.

By the protocol of reference.py:

    git clone https://github.com/IST-DASLab/gptq
    python benchmarks/public_gptq.py --repository gptq --data DATA --order 1 --half-scales

Needs torch. Stages of a block one after another ("true sequential"), as here. `--order 0` is the
protocol's own order of the calibration windows; another number shuffles them, which changes nothing
but the order of sums. `--half-scales` rounds scales to the 16 bits that GPTQ files hold.
"""

import argparse
import contextlib
import json
import random
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from idp_jax import load_model, save_model
from idp_jax.jobs.progress import Bars

MODEL = "smollm2-135m"
LENGTH = 512
STAGES = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


def windows(tokenizer, path: Path, field: str, count: int) -> torch.Tensor:
    """The first windows [count, 512] of a file's documents, joined by blank lines."""
    lines = path.read_text(encoding="utf-8").splitlines()
    text = "\n\n".join(json.loads(line)[field] for line in lines)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0]
    return ids[: count * LENGTH].reshape(count, LENGTH)


def perplexity(model, held_out: torch.Tensor) -> float:
    """Of windows [N, 512], each alone."""
    losses = [
        model(w[None], labels=w[None]).loss for w in Bars().tracker("perplexity")(list(held_out))
    ]
    return float(torch.stack(losses).mean().exp())


def compress_block(block, run, bits: int, group_size: int, half_scales: bool) -> None:
    """Quantises the matrices of a block in place.

    Args:
        block: a layer of the model.
        run: passes the calibration windows through the block.
    """
    from gptq import GPTQ  # of the public repository
    from quant import Quantizer

    class HalfQuantizer(Quantizer):
        def find_params(self, x, weight=False):
            super().find_params(x, weight)
            self.scale = self.scale.half().float()

    modules = dict(block.named_modules())
    for stage in STAGES:
        solvers, hooks = [], []
        for name in stage:
            solver = GPTQ(modules[name])
            solver.quantizer = HalfQuantizer() if half_scales else Quantizer()
            solver.quantizer.configure(bits, perchannel=True, sym=False)
            watch = lambda _, inputs, output, solver=solver: solver.add_batch(inputs[0], output)
            hooks.append(modules[name].register_forward_hook(watch))
            solvers.append(solver)
        run()
        for hook in hooks:
            hook.remove()
        for solver in solvers:
            with contextlib.redirect_stdout(None):
                solver.fasterquant(percdamp=0.01, groupsize=group_size)


def compress(model, calibration: torch.Tensor, **settings) -> None:
    """Quantises the model in place, a block at a time, one window at a time."""
    hidden = list(model.model.embed_tokens(calibration).split(1))
    positions = torch.arange(LENGTH)[None]
    shared = {
        "position_ids": positions,
        "position_embeddings": model.model.rotary_emb(hidden[0], positions),
        "attention_mask": torch.full((LENGTH, LENGTH), float("-inf")).triu(1)[None, None],
    }
    for block in Bars().tracker("layers")(list(model.model.layers)):
        run = lambda block=block, own=hidden: [block(window, **shared) for window in own]
        compress_block(block, run, **settings)
        hidden = [out[0] if isinstance(out, tuple) else out for out in run()]


def main() -> None:
    """Prints the perplexity."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repository", type=Path, required=True, help="a clone of IST-DASLab/gptq")
    parser.add_argument("--data", type=Path, required=True, help="folder with c4/ and wikitext2/")
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--group-size", type=int, default=-1)
    parser.add_argument("--order", type=int, default=0, help="of the calibration windows")
    parser.add_argument("--half-scales", action="store_true")
    parser.add_argument("--samples", type=int, default=32, help="windows of calibration")
    parser.add_argument("--windows", type=int, default=40, help="windows of perplexity")
    arguments = parser.parse_args()
    sys.path.insert(0, str(arguments.repository))
    torch.cuda.synchronize = lambda: None  # the implementation expects a GPU
    torch.set_grad_enabled(False)
    with tempfile.TemporaryDirectory() as scratch:
        folder = save_model(load_model(MODEL), Path(scratch) / MODEL, like=MODEL)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    calibration = windows(tokenizer, arguments.data / "c4/train.jsonl", "text", arguments.samples)
    if arguments.order:
        order = list(range(len(calibration)))
        random.Random(arguments.order).shuffle(order)
        calibration = calibration[order]
    compress(
        model,
        calibration,
        bits=arguments.bits,
        group_size=arguments.group_size,
        half_scales=arguments.half_scales,
    )
    held_out = windows(
        tokenizer, arguments.data / "wikitext2/test.jsonl", "page", arguments.windows
    )
    print(f"order {arguments.order}: perplexity {perplexity(model, held_out):.3f}")


if __name__ == "__main__":
    main()
