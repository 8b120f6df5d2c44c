"""How compile time grows with depth, of the forward pass and of a soft prompt's gradient step.

The layers are one loop, so the ratios of 32 layers to 4 should be near 1.

    python benchmarks/compile_time.py --width 256 --repeats 3
"""

import argparse
import json
import time

import jax
import jax.numpy as jnp

from idp_jax.models import Decoder, ModelConfig
from idp_jax.models.block import Block
from idp_jax.models.config import RopeConfig
from idp_jax.models.layers import Norm
from idp_jax.weights import Dense

DEPTHS = (4, 32)


def model_of(layers: int, width: int) -> Decoder:
    """A LLaMA of this depth whose arrays are shapes only: compiling needs no numbers."""
    heads = max(width // 64, 1)
    config = ModelConfig(
        architecture="llama",
        vocab_size=1024,
        num_layers=layers,
        hidden_dim=width,
        embedding_dim=width,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=width // heads,
        ffw_dim=3 * width,
        max_positions=2048,
        activation="silu",
        norm_epsilon=1e-5,
        norm_before=True,
        final_norm=True,
        norm_affine=True,
        attention_bias=False,
        mlp_bias=False,
        tied_embeddings=True,
        rope=RopeConfig(10000.0, "default"),
        bos_token_id=1,
        eos_token_ids=(2,),
        pad_token_id=0,
    )

    def build() -> Decoder:
        def norm(*leading: int) -> Norm:
            scale = jnp.ones((*leading, width), jnp.float32)
            return Norm(scale, centred=False, epsilon=config.norm_epsilon)

        def dense(rows: int, columns: int) -> Dense:
            return Dense(jnp.zeros((layers, rows, columns), jnp.float32))

        weights = {name: dense(width, width) for name in "qkvo"}
        weights |= {name: dense(width, 3 * width) for name in ("gate", "up")}
        weights["down"] = dense(3 * width, width)
        block = Block(weights, norm(layers), norm(layers), config)
        embedding = jnp.zeros((config.vocab_size, width), jnp.float32)
        return Decoder(config, embedding=embedding, layers=block, final_norm=norm())

    return jax.eval_shape(build)


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
