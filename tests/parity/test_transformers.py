"""Live comparison with transformers, module by module, on random tiny models and on SmolLM2."""

import jax
import numpy as np
import pytest

from idp_jax import load_model, load_tokenizer
from idp_jax.models.block import layer_slice
from tests.golden.cases import CASES, LIVE_CASES, batch
from tests.helpers import needs_smollm2

torch = pytest.importorskip("torch")
generate = pytest.importorskip("tests.golden.generate")

GRID = {name: case[0] for name, case in CASES.items()} | LIVE_CASES
# Sums in another order; hidden states reach 10, logits 15.
TOLERANCE = 2e-5


@pytest.fixture(scope="module", params=sorted(GRID))
def pair(request, tmp_path_factory):
    """A transformers model and ours, loaded from what transformers saved."""
    theirs = generate.random_model(GRID[request.param], seed=11)
    folder = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder)
    return theirs, load_model(folder)


def _largest_difference(ours, theirs, mask) -> float:
    theirs = theirs.numpy() if isinstance(theirs, torch.Tensor) else theirs
    return np.abs(np.asarray(ours) - theirs)[mask.astype(bool)].max()


def _captured(model, ids, mask):
    """The outputs of every attention and every layer, in order, and the model's own output."""
    layers = getattr(model.model, "layers", None)
    layers = model.model.decoder.layers if layers is None else layers
    outputs, handles = [], []

    def keep(module, inputs, output):
        outputs.append(output[0] if isinstance(output, tuple) else output)

    for layer in layers:
        handles += [layer.self_attn.register_forward_hook(keep), layer.register_forward_hook(keep)]
    result = generate.run(model, ids, mask)
    for handle in handles:
        handle.remove()
    return outputs, result.logits


@jax.jit
def _our_outputs(model, ids, mask):
    """The same outputs of ours, layer by layer without the scan, and the logits."""
    h, context, _ = model.start(model.embed(ids), mask)
    outputs = []
    for layer in range(model.config.num_layers):
        block = layer_slice(model.layers, layer)
        attended, _ = block.attention_output(block.attention_input(h), context)
        h, _ = block(h, context)
        outputs += [block.o(attended), h]
    return outputs, model.logits(model.finish(h))


def test_modules_match(pair):
    theirs, ours = pair
    ids, mask = batch()
    expected, expected_logits = _captured(theirs, ids, mask)
    outputs, logits = _our_outputs(ours, ids, mask)
    for number, (output, wanted) in enumerate(zip(outputs, expected, strict=True)):
        # The rounding of all modules up to here adds up.
        assert _largest_difference(output, wanted, mask) <= 1e-5 * (1 + number // 2), number
    assert _largest_difference(logits, expected_logits, mask) <= TOLERANCE
    assert _largest_difference(ours(ids, mask), expected_logits, mask) <= TOLERANCE


@pytest.mark.parametrize("case", ["llama-gqa", "opt-post-norm"])
def test_long_rows_match(case, tmp_path):
    """More tokens than one block of attention holds."""
    theirs = generate.random_model(GRID[case] | {"max_position_embeddings": 512}, seed=11)
    theirs.save_pretrained(tmp_path / "model")
    ids, mask = batch(300)
    mask[1, 130:] = 0
    mask[2, :135] = 0
    logits = load_model(tmp_path / "model")(ids, mask)
    assert _largest_difference(logits, generate.run(theirs, ids, mask).logits, mask) <= TOLERANCE


@pytest.mark.parametrize("case", ["llama-biases", "opt-post-norm"])
def test_gradient_of_embeddings_matches(case, tmp_path):
    """What a soft prompt is trained by: the loss's gradient with respect to input embeddings."""
    theirs = generate.random_model(GRID[case], seed=11)
    theirs.save_pretrained(tmp_path / "model")
    ours = load_model(tmp_path / "model")
    embeddings = np.asarray(ours.embed(batch()[0][:1]))
    inputs = torch.tensor(embeddings, requires_grad=True)
    torch.logsumexp(theirs(inputs_embeds=inputs).logits, -1).square().mean().backward()

    def loss(embeddings):
        logits = ours.logits(ours.hidden(embeddings=embeddings))
        return jax.numpy.square(jax.nn.logsumexp(logits, -1)).mean()

    gradient, expected = np.asarray(jax.jit(jax.grad(loss))(embeddings)), inputs.grad.numpy()
    assert np.abs(gradient - expected).max() <= 1e-5 * np.abs(expected).max()


TEXTS = (
    "The tide turned a little after four, and by the time the lighthouse keeper had finished "
    "his tea the causeway was under water. He had lived on the rock for 31 years, had seen 2 "
    "wars and 1,204 storms, and still counted the ships each evening in a ledger bound in "
    "green cloth. Tonight there were only three, and the last of them carried no lights at "
    "all.",
    "def read_lines(path):\n    with open(path, encoding='utf-8') as handle:\n        for "
    "number, line in enumerate(handle, start=1):\n            yield number, "
    "line.rstrip('\\n')\n\nThe function above is a generator: it opens the file, numbers its "
    "lines from 1, and gives them one by one, so that a file of any size can be read without "
    "holding it in memory.",
    "Photosynthesis converts light energy into chemical energy. In plants it takes place in "
    "the chloroplasts, where chlorophyll absorbs mostly red and blue light. Water is split "
    "into oxygen, protons and electrons; the oxygen leaves the leaf, and the electrons "
    "travel along a chain of proteins that pumps protons across a membrane. The gradient "
    "drives an enzyme that makes ATP, and in the Calvin cycle ATP and NADPH turn carbon "
    "dioxide into sugar.",
)


@pytest.fixture(scope="module")
def smollm2():
    """The real model both ways."""
    from transformers import AutoModelForCausalLM

    from idp_jax.formats import resolve

    path = resolve("smollm2-135m")
    theirs = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    return theirs.eval(), load_model("smollm2-135m")


@needs_smollm2
@pytest.mark.usefixtures("optimised")
def test_smollm2_logits_match(smollm2):
    theirs, ours = smollm2
    rows = [load_tokenizer("smollm2-135m")(text)["input_ids"] for text in TEXTS]
    assert all(64 <= len(row) <= 128 for row in rows)
    length = max(map(len, rows))
    ids = np.array([row + [0] * (length - len(row)) for row in rows], np.int32)
    mask = np.array([[1] * len(row) + [0] * (length - len(row)) for row in rows], np.int32)
    # Logits reach 40; 30 layers of float32 sums in another order.
    assert (
        _largest_difference(ours(ids, mask), generate.run(theirs, ids, mask).logits, mask) <= 2e-4
    )
