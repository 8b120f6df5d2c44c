"""Every term of an objective against float64, in value and gradient, and what each form keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idp_jax.config import ConfigError
from idp_jax.models import Decoder
from idp_jax.models.head import Head
from idp_jax.recover import Repaired
from idp_jax.recover.replaced import with_parameters
from idp_jax.training import Batch, make_objective, objectives
from idp_jax.training.chunks import join, split
from idp_jax.training.terms import parse
from idp_jax.training.word import Full, Sampled, TopK, Word, shorten
from tests.helpers import tiny_decoder, tiny_ids

TEMPERATURE = 1.5
K = 5


def random(seed: int = 1) -> np.random.Generator:
    """Numbers that do not depend on which tests run."""
    return np.random.default_rng(seed)


def softmax(x: np.ndarray) -> np.ndarray:
    """Along the last axis, float64."""
    x = np.exp(np.float64(x) - np.max(x, -1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def divergence(ours: np.ndarray, theirs: np.ndarray, kept: np.ndarray | None = None):
    """KL(teacher || student) T^2 of logits [N, V] and d/d ours; with `kept` over K + 1 cells."""
    p, q = softmax(ours / TEMPERATURE), softmax(theirs / TEMPERATURE)
    if kept is None:
        value, slope = (q * np.log(q / p)).sum(-1), p - q
    else:
        here = np.zeros(p.shape, bool)
        np.put_along_axis(here, kept, True, -1)
        rest_p, rest_q = (np.where(here, 0, x).sum(-1, keepdims=True) for x in (p, q))
        value = np.where(here, q * np.log(q / p), 0).sum(-1)
        value = value + (rest_q * np.log(rest_q / rest_p))[..., 0]
        slope = np.where(here, p - q, p * (1 - rest_q / rest_p))
    return value * TEMPERATURE**2, slope * TEMPERATURE


def cases() -> tuple[np.ndarray, np.ndarray]:
    """Logits of a student and of a teacher, [20, 30]."""
    rng = random(0)
    ours, theirs = rng.normal(0, 2, (20, 30)), rng.normal(0, 3, (20, 30))
    return ours.astype(np.float32), theirs.astype(np.float32)


def slope_of(word, ours):
    """The divergence of every row, and the gradient of their sum."""
    value = lambda logits: word.divergence(logits).sum()
    return word.divergence(jnp.asarray(ours)), jax.grad(value)(jnp.asarray(ours))


def likeliest(theirs: np.ndarray) -> np.ndarray:
    """The K largest of every row."""
    return np.argsort(-theirs, -1)[..., :K]


def topk(theirs) -> TopK:
    """What the form keeps."""
    return TopK.of(jnp.asarray(theirs), K, TEMPERATURE, None)


@pytest.mark.parametrize("form", ["full", "topk"])
def test_value_and_gradient_are_those_of_float64(form):
    ours, theirs = cases()
    word = topk(theirs) if form == "topk" else Full(jnp.asarray(theirs), TEMPERATURE)
    found = slope_of(word, ours)
    expected = divergence(ours, theirs, likeliest(theirs) if form == "topk" else None)
    for mine, right in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine, right, rtol=1e-5, atol=1e-6)


def test_the_sampled_gradient_has_the_full_ones_mean():
    """Of 600 means some lie beyond three standard errors by chance, a rare token's furthest."""
    ours, theirs = cases()
    draws = 4000
    uniform = jnp.asarray(random().random((draws, len(theirs))), jnp.float32)
    draw = lambda u: slope_of(Sampled.of(jnp.asarray(theirs), K, TEMPERATURE, u), ours)
    value, slope = (np.float64(x) for x in jax.jit(jax.vmap(draw))(uniform))
    expected, right = divergence(ours, theirs)
    error = value.std(0, ddof=1) / np.sqrt(draws)
    assert (np.abs(value.mean(0) - expected) <= 3 * error).mean() >= 0.95
    # A token has floor(K q) or one more of the K draws: a Bernoulli variable of a known variance.
    share = np.modf(K * softmax(theirs / TEMPERATURE))[0]
    error = TEMPERATURE / K * np.sqrt(share * (1 - share) / draws)
    gap = np.abs(slope.mean(0) - right)
    assert (gap <= 3 * error + 1e-6).mean() > 0.99 and (gap <= 8 * error + 1e-6).all()


def test_along_any_direction_the_sampled_gradient_is_within_three_standard_errors():
    ours, theirs = cases()
    uniform = jnp.asarray(random().random((4000, len(ours))), jnp.float32)
    draw = lambda u: slope_of(Sampled.of(jnp.asarray(theirs), K, TEMPERATURE, u), ours)[1]
    drawn = np.float64(jax.jit(jax.vmap(draw))(uniform)).reshape(4000, -1)
    along = divergence(ours, theirs)[1].ravel()
    found = drawn @ along
    error = found.std(ddof=1) / np.sqrt(len(found))
    assert abs(found.mean() - along @ along) <= 3 * error


def test_equal_steps_vary_less_than_independent_draws():
    ours, theirs = cases()
    tokens, rows = 16, 2000
    uniform = jnp.asarray(random().random((rows, len(ours))), jnp.float32)
    draw = lambda u: slope_of(Sampled.of(jnp.asarray(theirs), tokens, TEMPERATURE, u), ours)[1]
    found = np.float64(jax.jit(jax.vmap(draw))(uniform)).var(0).sum()
    q = softmax(theirs / TEMPERATURE)
    independent = (q * (1 - q)).sum() / tokens * TEMPERATURE**2
    assert found < 0.7 * independent


def test_the_rest_is_right_in_sum_and_its_bias_is_the_rests_own_shape():
    """Kept tokens have the full gradient; the rest's is p - r_q p / r_p instead of p - q."""
    ours, theirs = cases()
    kept = likeliest(theirs)
    found = np.float64(slope_of(topk(theirs), ours)[1])
    full = divergence(ours, theirs)[1]
    here = np.zeros(full.shape, bool)
    np.put_along_axis(here, kept, True, -1)
    np.testing.assert_allclose(found[here], full[here], atol=1e-5)
    np.testing.assert_allclose(
        np.where(here, 0, found).sum(-1), np.where(here, 0, full).sum(-1), atol=1e-5
    )
    p, q = softmax(ours / TEMPERATURE), softmax(theirs / TEMPERATURE)
    p, q = np.where(here, 0, p), np.where(here, 0, q)
    bias = (q - p * q.sum(-1, keepdims=True) / p.sum(-1, keepdims=True)) * TEMPERATURE
    np.testing.assert_allclose(found - full, bias, atol=1e-5)
    assert (divergence(ours, theirs, kept)[0] <= divergence(ours, theirs)[0]).all()


def test_where_the_rest_has_the_teachers_shape_top_k_is_the_full_gradient():
    ours, theirs = cases()
    here = np.zeros(theirs.shape, bool)
    np.put_along_axis(here, likeliest(theirs), True, -1)
    ours = np.where(here, ours, theirs - 1).astype(np.float32)
    np.testing.assert_allclose(
        slope_of(topk(theirs), ours)[1], divergence(ours, theirs)[1], atol=2e-5
    )


def test_truncation_that_renormalises_has_another_gradient():
    """It is 0 at a student that has the K tokens' odds and no other's: the full one is not."""
    _, theirs = cases()
    kept = likeliest(theirs)
    ours = np.full_like(theirs, -30.0)
    np.put_along_axis(ours, kept, np.take_along_axis(theirs, kept, -1), -1)

    def renormalised(logits):
        mine, right = (
            jax.nn.log_softmax(jnp.take_along_axis(x / TEMPERATURE, jnp.asarray(kept), -1))
            for x in (logits, jnp.asarray(theirs))
        )
        return (jnp.exp(right) * (right - mine)).sum()

    with jax.numpy_dtype_promotion("standard"):
        wrong = jax.grad(renormalised)(jnp.asarray(ours))
    assert np.abs(wrong).max() < 1e-6
    assert np.abs(divergence(ours, theirs)[1]).max() > 0.05
    found = slope_of(topk(theirs), ours)[1]
    full = divergence(ours, theirs)[1]
    assert np.abs(np.take_along_axis(np.asarray(found) - full, kept, -1)).max() < 1e-5


def test_everything_may_be_kept():
    ours, theirs = cases()
    word = TopK.of(jnp.asarray(theirs), theirs.shape[-1], TEMPERATURE, None)
    for mine, right in zip(slope_of(word, ours), divergence(ours, theirs), strict=True):
        np.testing.assert_allclose(mine, right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("text", ["ce", "kl + 0.5*ce", "hidden_mse + 2*cka", "kl + cka"])
def test_an_objective_is_that_of_all_logits_at_once(monkeypatch, text, tied):
    """In value and gradient, of the hidden states and of a head that is trained."""
    monkeypatch.setattr("idp_jax.training.chunks.POSITIONS_AT_ONCE", 8)
    student = tiny_decoder("opt" if tied else "llama", num_layers=1)
    teacher = tiny_decoder("opt" if tied else "llama", num_layers=1, seed=1)
    tokens = tiny_ids(student, batch=3, time=11)
    mask = jnp.asarray(random().random(tokens.shape) < 0.7)
    theirs = teacher.hidden(tokens)
    word = Word(theirs, teacher.output_head(), None, TEMPERATURE)
    batch = Batch(tokens, loss_mask=mask, teacher=word)
    start = {"embedding" if tied else "head.kernel": _matrix(student, tied)}
    if not tied:
        start["final_norm.scale"] = student.final_norm.scale[...]  # through the hidden states

    def chunked(values):
        return make_objective(text)(Repaired(with_parameters(student, values)), batch)

    def whole(values):
        return _reference(text, with_parameters(student, values), teacher, tokens, mask)

    (loss, parts), slope = jax.jit(jax.value_and_grad(chunked, has_aux=True))(start)
    expected, right = jax.jit(jax.value_and_grad(whole))(start)
    np.testing.assert_allclose(loss, expected, rtol=2e-5)
    assert set(parts) == {part.split("*")[-1] for part in text.split(" + ")}
    for name in start:
        size = np.abs(right[name]).max()
        np.testing.assert_allclose(slope[name], right[name], atol=2e-5 * size, err_msg=name)


def _matrix(model: Decoder, tied: bool):
    return model.embedding[...] if tied else model.head.kernel[...]


def _reference(text: str, student: Decoder, teacher: Decoder, tokens, mask):
    """The formulas at once, over all logits."""
    weight = mask[:, 1:].astype(jnp.float32)
    weight = weight / weight.sum()
    h, g = student.hidden(tokens)[:, :-1], teacher.hidden(tokens)[:, :-1]
    ours, theirs = student.logits(h), teacher.logits(g)
    log_p, log_q = (jax.nn.log_softmax(x / jnp.float32(TEMPERATURE)) for x in (ours, theirs))
    mean = lambda x: (x * weight).sum()
    x, y = ((s - (s * weight[..., None]).sum((0, 1))) for s in (h, g))
    flat = lambda s: (s * jnp.sqrt(weight)[..., None]).reshape(-1, s.shape[-1])
    kernel = lambda s: flat(s) @ flat(s).T  # HSIC of [N, N] Gram matrices, the dual form
    inner = lambda a, b: (kernel(a) * kernel(b)).sum()
    found = {
        "ce": mean(-jnp.take_along_axis(jax.nn.log_softmax(ours), tokens[:, 1:, None], -1)[..., 0]),
        "kl": mean((jnp.exp(log_q) * (log_q - log_p)).sum(-1)) * jnp.float32(TEMPERATURE**2),
        "hidden_mse": mean(jnp.square(h - g).mean(-1)),
        "cka": 1 - inner(x, y) / jnp.sqrt(inner(x, x) * inner(y, y)),
    }
    weights = {"kl + 0.5*ce": (1, 0.5), "hidden_mse + 2*cka": (1, 2)}.get(text, (1, 1))
    names = [part.split("*")[-1] for part in text.split(" + ")]
    return sum(jnp.float32(w) * found[n] for w, n in zip(weights, names, strict=False))


def test_a_frozen_head_has_no_gradient_computed():
    """No array of the head's size leaves the loop over the chunks."""
    model = tiny_decoder("llama", num_layers=1)
    tokens = tiny_ids(model, batch=2, time=9)

    def loss(values, decoder):
        return objectives.next_token(Repaired(with_parameters(decoder, values)), Batch(tokens))[0]

    def scans(values) -> str:
        return str(jax.make_jaxpr(jax.grad(loss))(values, model))

    scale = {"final_norm.scale": model.final_norm.scale[...]}
    kernel = {"head.kernel": model.head.kernel[...]}
    size = f"f32[{','.join(map(str, model.head.kernel.shape))}] = broadcast_in_dim"
    assert size not in scans(scale) and size in scans(kernel)


@pytest.mark.parametrize("form", ["topk", "sampled"])
def test_a_word_is_the_same_in_chunks(monkeypatch, form):
    monkeypatch.setattr("idp_jax.training.chunks.POSITIONS_AT_ONCE", 6)
    hidden = jnp.asarray(random().normal(size=(2, 11, 4)), jnp.float32)
    head = Head(jnp.asarray(random().normal(size=(4, 30)), jnp.float32), turned=False)
    uniform = jnp.asarray(random().random((2, 11)), jnp.float32)
    found = shorten(hidden, head, form, K, TEMPERATURE, uniform)
    kind = TopK if form == "topk" else Sampled
    expected = kind.of(head(hidden), K, TEMPERATURE, uniform)
    for name, axes in kind.FIELDS.items():
        assert getattr(found, name).ndim == axes
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-5)


def test_chunks_are_put_together_again(monkeypatch):
    monkeypatch.setattr("idp_jax.training.chunks.POSITIONS_AT_ONCE", 4)
    x = jnp.arange(2 * 7 * 3).reshape(2, 7, 3)
    chunks = split(x, 2, 7)
    assert chunks.shape == (4, 2, 2, 3) and (join(chunks, 7) == x).all()


def test_penalties_of_a_repair_are_added_and_logged(monkeypatch):
    model = tiny_decoder("llama", num_layers=1)
    tokens = tiny_ids(model)
    penalty = lambda self, tokens: (None, {"balance": jnp.float32(3)})
    plain = make_objective("ce")(Repaired(model), Batch(tokens))[0]
    monkeypatch.setattr(Repaired, "serve", penalty)
    loss, parts = make_objective("2*ce")(Repaired(model), Batch(tokens))
    assert float(loss) == pytest.approx(2 * float(plain) + 3) and set(parts) == {"ce", "balance"}


def test_a_sum_is_read():
    terms = parse(" kl+0.5 * ce + 1e+1*hidden_mse ")
    assert [(t.name, t.weight) for t in terms] == [("kl", 1), ("ce", 0.5), ("hidden_mse", 10)]
    assert [t.needs_teacher for t in terms] == [True, False, True]


def gradient_norm(logits, positions):
    """A term whose name a step logs already."""
    return positions.targets * logits[..., 0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no sum of terms; give one such as 'kl [+] 0.5[*]ce', of ce, kl, hidden_mse, cka"),
        ("ce +", "no sum of terms"),
        ("0.5*", "no sum of terms"),
        ("bce", "no term 'bce'; there are ce, kl, hidden_mse, cka"),
        ("0*ce", "weight of ce must be a number above 0"),
        ("1.2.3*ce", "weight of ce must be a number above 0"),
        ("ce + 2*ce", "names ce twice"),
        (
            f"{__name__}:gradient_norm",
            "gradient_norm is what a step logs beside the terms; give the",
        ),
        ("none.py:f", "there is no file none.py with a term"),
    ],
)
def test_what_is_no_sum_is_refused_in_one_line(text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        parse(text)
    assert "\n" not in str(caught.value)


MINE = """
import jax
def confidence(logits, positions, *, power=1.0):
    return jax.nn.softmax(logits).max(-1) ** jax.numpy.float32(power)
"""


def test_a_term_of_ones_own(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    model = tiny_decoder("llama", num_layers=1)
    tokens = tiny_ids(model)
    objective = make_objective(f"ce + 2*{tmp_path / 'mine.py'}:confidence(power=2.0)")
    loss, parts = objective(Repaired(model), Batch(tokens))
    expected = np.mean(softmax(model(tokens)[:, :-1]).max(-1) ** 2)
    assert float(parts["confidence"]) == pytest.approx(expected, rel=1e-5)
    assert float(loss) == pytest.approx(float(parts["ce"]) + 2 * expected, rel=1e-5)
