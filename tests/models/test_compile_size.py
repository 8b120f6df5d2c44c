"""The program does not grow with depth: the layers are one loop.

benchmarks/compile_time.py times what this counts.
"""

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import jaxprs_in_params

from tests.helpers import quantize_decoder, tiny_decoder, tiny_ids


def _equations(jaxpr) -> int:
    """All equations of a program, those of loops and calls inside it included."""
    count = 0
    for equation in jaxpr.eqns:
        count += 1 + sum(_equations(inner) for inner in jaxprs_in_params(equation.params))
    return count


def _forward(model):
    ids = tiny_ids(model)
    return jax.make_jaxpr(lambda model, ids: model.logits(model.hidden(ids)))(model, ids)


def _prompt_gradient(model):
    ids = tiny_ids(model)

    def loss(prompt, model):
        _, past = model.hidden(embeddings=prompt, keep=True, remat="layer")
        return jnp.square(model.logits(model.hidden(ids, past=past, remat="layer"))).mean()

    prompt = jnp.ones((1, 4, model.config.embedding_dim), jnp.float32)
    return jax.make_jaxpr(jax.grad(loss))(prompt, model)


@pytest.mark.parametrize("program", [_forward, _prompt_gradient])
@pytest.mark.parametrize(
    ("architecture", "packed"), [("llama", False), ("llama", True), ("opt", False)]
)
def test_program_size_does_not_depend_on_depth(architecture, packed, program):
    sizes = []
    for layers in (4, 32):
        model = tiny_decoder(architecture, num_layers=layers)
        model = quantize_decoder(model, 4) if packed else model
        sizes.append(_equations(program(model).jaxpr))
    assert sizes[0] == sizes[1] > 50


def test_one_shape_compiles_once():
    from idp_jax.models.decoder import _logits

    model = tiny_decoder("llama", vocab_size=100)
    before = _logits._cache_size()
    for seed in range(3):
        model(tiny_ids(model, seed=seed))
    other_weights = tiny_decoder("llama", vocab_size=100, seed=1)
    other_weights(tiny_ids(model))
    assert _logits._cache_size() == before + 1


def test_a_profile_tells_the_parts_of_a_model():
    model = tiny_decoder("llama")
    forward = jax.jit(lambda model, ids: model.logits(model.hidden(ids)))
    text = forward.lower(model, tiny_ids(model)).as_text(debug_info=True)
    for scope in ("embed", "layers/while/body", "attention", "mlp", "head"):
        assert f"/{scope}/" in text or f"{scope}/" in text, scope
