"""How compile time grows with depth, of the forward pass and of a soft prompt's gradient step.

The layers are one loop, so the ratios of 32 layers to 4 should be near 1.

    python benchmarks/compile_time.py --width 256 --repeats 3
"""

import argparse
import json
import time

import jax
import jax.numpy as jnp
from transformers import LlamaConfig

from idp_jax.models import Decoder
from idp_jax.models.abstract import abstract
from idp_jax.models.config import from_hf

DEPTHS = (4, 32)


def model_of(layers: int, width: int) -> Decoder:
    """A LLaMA of this depth whose arrays are shapes only: compiling needs no numbers."""
    config = LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        num_attention_heads=max(1, width // 64),
        intermediate_size=3 * width,
        vocab_size=1024,
        tie_word_embeddings=True,
    )
    return abstract(from_hf(config))


def forward(model: Decoder, prompt: jax.Array, ids: jax.Array) -> jax.Array:
    """Logits; the prompt is not used."""
    return model.logits(model.hidden(ids))


def prompt_step(model: Decoder, prompt: jax.Array, ids: jax.Array) -> jax.Array:
    """One gradient step on the prompt [1, P, E], whose keys and values stand before the input."""

    def loss(prompt):
        _, past = model.hidden(embeddings=prompt, keep=True)
        logits = model.logits(model.hidden(ids, past=past))
        picked = jnp.take_along_axis(logits[:, :-1], ids[:, 1:, None], -1)[..., 0]
        return (jax.nn.logsumexp(logits[:, :-1], -1) - picked).mean()

    return prompt - 0.1 * jax.grad(loss)(prompt)


def compile_seconds(function, layers: int, width: int) -> float:
    """Seconds from the Python function to an executable: tracing, lowering and compiling."""
    prompt = jax.ShapeDtypeStruct((1, 20, width), jnp.float32)
    ids = jax.ShapeDtypeStruct((4, 128), jnp.int32)
    model = model_of(layers, width)
    jax.clear_caches()
    start = time.perf_counter()
    jax.jit(function).lower(model, prompt, ids).compile()
    return time.perf_counter() - start


def main() -> None:
    """Prints one JSON line per program: seconds by depth, and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3, help="the fastest of this many counts")
    options = parser.parse_args()
    for function in (forward, prompt_step):
        runs = [
            [compile_seconds(function, layers, options.width) for layers in DEPTHS]
            for _ in range(options.repeats)
        ]
        best = [min(run[column] for run in runs) for column in range(len(DEPTHS))]
        seconds = {
            f"{layers} layers": round(value, 3) for layers, value in zip(DEPTHS, best, strict=True)
        }
        row = {
            "program": function.__name__,
            "seconds": seconds,
            "ratio": round(best[1] / best[0], 3),
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
