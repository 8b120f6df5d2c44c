"""The harness's requests against the plain definition: pair by pair, no branches, no padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lm_eval.api.instance import Instance

from idp_jax.evaluation import requests as scoring
from idp_jax.evaluation.harness import HarnessLM
from idp_jax.evaluation.requests import Request, plan_rows, score_requests
from idp_jax.recover import LoraAdapter, PrefixAdapter, Repaired, SoftPrompt
from tests.helpers import quantize_decoder, tiny_decoder, tiny_pool, tiny_tokenizer

SIZE = {"vocab_size": 259}
TOKENS = tiny_tokenizer()


def pool(model):
    return tiny_pool(model, 3, 5).repair(model)


def prompt(model):
    return SoftPrompt.init(model, 4, jax.random.key(0)).repair(model)


def deep(model):
    """A prefix that the first layer does without."""
    words = SoftPrompt.init(model, 4, jax.random.key(0)).embeddings[...]
    return PrefixAdapter.of(model, words, lengths=(0, 4)).repair(model)


def lora(model):
    adapter = LoraAdapter.init(model, 2, jax.random.key(0))
    adapter.b = jax.tree.map(lambda b: b + 0.1, adapter.b)
    return adapter.repair(model)


VARIANTS = {
    "llama": lambda: tiny_decoder("llama", **SIZE),
    "llama-packed": lambda: quantize_decoder(tiny_decoder("llama", **SIZE), 4),
    "llama-lora": lambda: lora(tiny_decoder("llama", **SIZE)),
    "llama-prompt": lambda: prompt(tiny_decoder("llama", **SIZE)),
    "llama-deep": lambda: deep(tiny_decoder("llama", **SIZE)),
    "llama-pool": lambda: pool(tiny_decoder("llama", **SIZE)),
    "opt": lambda: tiny_decoder("opt", **SIZE),
    "opt-pool": lambda: pool(tiny_decoder("opt", **SIZE)),
}


def ask(kind, *arguments, task="task", doc=0):
    return Instance(kind, {}, arguments, 0, (task, doc, 1))


_past = jax.jit(Repaired.past)


def plain_score(model, context, continuation, chooses=None):
    """Reads both as one text; a pool chooses from `chooses`, by default the context."""
    repaired = Repaired.of(model)
    chooses = context if chooses is None else chooses
    past = _past(
        repaired, jnp.asarray([chooses], jnp.int32), jnp.ones((1, len(chooses)), jnp.int32)
    )
    text = context + continuation
    padded = jnp.asarray([text + [0] * (64 - len(text))], jnp.int32)
    logits = np.asarray(repaired.decoder(padded, past=past), np.float64)[
        0, len(context) - 1 : len(text) - 1
    ]
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    picked = logprobs[np.arange(len(continuation)), continuation].sum()
    return picked, bool((logits.argmax(-1) == continuation).all())


QUESTIONS = [
    ("Which is it?", " this", 0),
    ("Which is it?", " that one", 0),
    ("Another question:", " x", 1),
    ("Which is it?", " t", 0),
    ("Which is it? ", "y", 2),
    ("Another question:", " x", 1),
    ("", "text alone", 3),
    ("<s>", "z", 4),
]


@pytest.mark.parametrize("variant", VARIANTS)
def test_loglikelihood_equals_every_pair_alone(variant):
    model = VARIANTS[variant]()
    asked = [ask("loglikelihood", context, text, doc=doc) for context, text, doc in QUESTIONS]
    answers = HarnessLM(model, TOKENS, batch_size=3).loglikelihood(asked)
    for (context, text, _), answer in zip(QUESTIONS, answers, strict=True):
        stripped = context.rstrip()
        tokens = TOKENS.encode(stripped) if stripped else [TOKENS.bos_token_id]
        expected = plain_score(model, tokens, TOKENS.encode(context[len(stripped) :] + text))
        # Sums of up to ten log-probabilities of about -6.
        assert answer == (pytest.approx(expected[0], abs=1e-4), expected[1])


def greedy_text(model, context, count):
    ids = TOKENS.encode(context)
    for _ in range(count):
        ids.append(int(model(jnp.asarray([ids], jnp.int32))[0, -1].argmax()))
    return ids[-count:]


def test_greedy_continuation_is_found_greedy():
    model = tiny_decoder("llama", **SIZE)
    best = greedy_text(model, "abc", 2)
    other = [best[0], best[1] - 1]
    scores = score_requests(
        Repaired.of(model),
        [Request(TOKENS.encode("abc"), x) for x in (best, other, best[:1])],
        2,
        64,
    )
    assert [score.greedy for score in scores] == [True, False, True]


@pytest.mark.parametrize("variant", ["llama-pool", "opt"])
def test_batch_size_and_order_have_no_effect(variant):
    model = VARIANTS[variant]()
    asked = [ask("loglikelihood", context, text, doc=doc) for context, text, doc in QUESTIONS]
    whole = HarnessLM(model, TOKENS, batch_size=8).loglikelihood(asked)
    for batch_size, order in ((1, [*range(8)]), (3, [5, 2, 7, 0, 1, 6, 3, 4])):
        parts = HarnessLM(model, TOKENS, batch_size).loglikelihood([asked[i] for i in order])
        for index, (logprob, greedy) in zip(order, parts, strict=True):
            assert (logprob, greedy) == (pytest.approx(whole[index][0], abs=1e-4), whole[index][1])


def test_long_texts_are_cut_from_the_left():
    model = tiny_decoder("llama", **SIZE)
    context, text = "the beginning is forgotten", " but not this"
    answers = HarnessLM(model, TOKENS, 2, max_length=20).loglikelihood(
        [ask("loglikelihood", context, text), ask("loglikelihood", context, text[:5])]
    )
    for answer, end in zip(answers, (text, text[:5]), strict=True):
        tokens, wanted = TOKENS.encode(context), TOKENS.encode(end)
        expected = plain_score(model, tokens[len(wanted) - 21 :], wanted)
        assert answer[0] == pytest.approx(expected[0], abs=1e-4)


def test_rows_that_grow_too_long_are_split(monkeypatch):
    model = tiny_decoder("llama", **SIZE)
    context = [5] * 10
    asked = [Request(context, [token] * 6) for token in range(10, 20)]
    monkeypatch.setattr(scoring, "MERGED_TOKENS", 25)
    rows = plan_rows(asked, 64)
    assert [len(row.tokens) for row in rows] == [25] * 3 + [15]
    assert [len(row.tokens) for row in plan_rows(asked, 15)] == [15] * 10
    split = score_requests(Repaired.of(model), asked, 2, 64)
    for request, score in zip(asked, split, strict=True):
        assert score.logprob == pytest.approx(
            plain_score(model, context, request.continuation)[0], abs=1e-4
        )


def test_one_row_per_question_and_one_token_answers_add_nothing():
    rows = plan_rows([Request([5, 6, 7], [token]) for token in (8, 9, 8, 10)], 64)
    assert len(rows) == 1 and rows[0].tokens == [5, 6, 7]
    assert rows[0].positions == [2, 2, 2] and rows[0].targets == [8, 9, 10]
    assert [owners for owners, _ in rows[0].answers] == [[0, 2], [1], [3]]


@pytest.mark.parametrize("variant", ["llama", "llama-pool", "opt-pool"])
@pytest.mark.parametrize("max_length", [12, 64])
def test_what_continuations_begin_with_is_read_once(variant, max_length):
    """Whole sentences that differ in their ends, and one that is the beginning of others."""
    model = VARIANTS[variant]()
    starts, ends = ([7, 8, 9, 10], [7, 8, 30], [40]), ([11], [12, 13], [12, 14, 15], [11, 12])
    texts = [[*start, *end] for start in starts for end in ends] + [[7, 8, 9], [7, 8, 9, 10]]
    asked = [Request([1], text) for text in texts]
    rows = plan_rows(asked, max_length)
    assert sum(len(row.tokens) for row in rows) < 0.7 * sum(len(text) for text in texts)
    assert max(len(row.tokens) for row in rows) <= max_length
    found = score_requests(Repaired.of(model), asked, 4, max_length)
    for text, score in zip(texts, found, strict=True):
        logprob, greedy = plain_score(model, [1], text)
        assert (score.logprob, score.greedy) == (pytest.approx(logprob, abs=1e-4), greedy)


def test_one_token_answers_before_longer_ones():
    """A one-token answer leaves no mark in the row, which must not move the context's end."""
    model = tiny_decoder("llama", **SIZE)
    answers = [[8], [9, 10], [11, 12, 13], [8, 9]]
    found = score_requests(Repaired.of(model), [Request([5, 6, 7], x) for x in answers], 1, 64)
    for answer, score in zip(answers, found, strict=True):
        assert score.logprob == pytest.approx(plain_score(model, [5, 6, 7], answer)[0], abs=1e-4)


def test_long_rows_are_read_fewer_at_a_time(monkeypatch):
    monkeypatch.setattr(scoring, "ATTENTION_CELLS", 2 * 64**2)
    rows = plan_rows([Request([n + 3] * 60, [4]) for n in range(3)], 64)
    assert [(len(batch), size) for batch, _, size in scoring._batches(rows, 8)] == [(2, 2), (1, 2)]


@pytest.mark.parametrize("variant", ["llama", "llama-pool", "opt-pool"])
def test_rolling_windows_score_every_token_once(variant):
    model = VARIANTS[variant]()
    text = "a text of more than two windows of tokens"
    harness = HarnessLM(model, TOKENS, 2, max_length=16)
    long, short = harness.loglikelihood_rolling(
        [ask("loglikelihood_rolling", text), ask("loglikelihood_rolling", "short", doc=1)]
    )
    ids = TOKENS.encode(text)
    windows = [([TOKENS.bos_token_id], ids[:16]), (ids[15:16], ids[16:32]), (ids[24:32], ids[32:])]
    expected = sum(plain_score(model, a, b, chooses=a + b[:-1])[0] for a, b in windows)
    assert long == pytest.approx(expected, abs=2e-4)
    ids = TOKENS.encode("short")
    alone = plain_score(model, [TOKENS.bos_token_id], ids, chooses=[TOKENS.bos_token_id, *ids[:-1]])
    assert short == pytest.approx(alone[0], abs=1e-4)


def test_pool_choices_are_counted_once_per_question():
    model = pool(tiny_decoder("llama", **SIZE))
    asked = [
        ask("loglikelihood", context, text, task="quiz", doc=doc)
        for context, text, doc in QUESTIONS
    ]
    harness = HarnessLM(model, TOKENS, 3)
    harness.loglikelihood(asked)
    harness.generate_until(
        [ask("generate_until", "abc", {"until": ["\n"], "max_gen_toks": 2}, task="say")]
    )
    ids = jnp.asarray([TOKENS.encode("Which is it?")], jnp.int32)
    assert harness.choices["quiz"][0] == [int(jax.jit(Repaired.choose)(model, ids)[0])]
    assert len(harness.choices["quiz"]) == 5 and len(harness.choices["say"]) == 1
    bare = HarnessLM(tiny_decoder("llama", **SIZE), TOKENS)
    bare.loglikelihood(asked[:1])
    assert bare.choices == {}


def test_few_compilations():
    model = tiny_decoder("llama", num_layers=1, **SIZE)
    harness = HarnessLM(model, TOKENS, 4)
    before = scoring._read._cache_size()
    for length in range(1, 64, 7):
        harness.loglikelihood(
            [ask("loglikelihood", "q" * length, " ab"), ask("loglikelihood", "q" * length, " c")]
        )
    assert scoring._read._cache_size() == before + 2  # 32 and 64 tokens


@pytest.mark.parametrize("variant", ["llama", "opt-pool"])
def test_generation_stops_at_strings(variant):
    model = VARIANTS[variant]()
    contexts = ["first", "the second of them", "3", ""]
    free = HarnessLM(model, TOKENS, 2).generate_until(
        [ask("generate_until", context, {"until": [], "max_gen_toks": 12}) for context in contexts]
    )
    stop = free[0][3:5]
    for until in ([stop], stop, [stop[0], "\n"]):
        cut = HarnessLM(model, TOKENS, 3).generate_until(
            [ask("generate_until", c, {"until": until, "max_gen_toks": 12}) for c in contexts]
        )
        ends = [until] if isinstance(until, str) else until
        for whole, part in zip(free, cut, strict=True):
            for end in ends:
                whole = whole.split(end)[0]
            assert part == whole


def test_requests_with_other_options_stay_apart():
    model = tiny_decoder("llama", **SIZE)
    asked = [
        ask("generate_until", "abc", {"until": [], "max_gen_toks": 3}),
        ask("generate_until", "abc", {"until": [], "max_gen_toks": 5}),
        ask(
            "generate_until",
            "abc",
            {"until": [], "max_gen_toks": 5, "do_sample": True, "temperature": 2.0},
        ),
    ]
    texts = HarnessLM(model, TOKENS).generate_until(asked)
    assert len(texts[0]) <= 3 and texts[1].startswith(texts[0]) and texts[2] != texts[1]
    assert HarnessLM(model, TOKENS).generate_until(asked) == texts


def test_bos_is_added_only_when_asked_and_only_once():
    model = tiny_decoder("llama", **SIZE)
    assert HarnessLM(model, TOKENS).tok_encode("ab") == TOKENS.encode("ab")
    assert HarnessLM(model, TOKENS).tok_encode("<s>ab") == [1, *TOKENS.encode("ab")]
    assert HarnessLM(model, TOKENS).tok_encode("ab", add_special_tokens=False) == TOKENS.encode(
        "ab"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"max_length": 0}, "max_length 0"),
        ({"max_length": 253}, "1 and 251"),
    ],
)
def test_bad_sizes_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        HarnessLM(pool(tiny_decoder("opt", **SIZE)), TOKENS, **arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 3}, "'num_beams' = 3 is not supported"),
        ({"max_gen_toks": 64}, "leave no room"),
    ],
)
def test_bad_generation_options_are_refused(options, message):
    harness = HarnessLM(tiny_decoder("llama", **SIZE), TOKENS, max_length=64)
    with pytest.raises(ValueError, match=message):
        harness.generate_until([ask("generate_until", "abc", options)])


def test_what_cannot_be_scored_is_refused():
    harness = HarnessLM(tiny_decoder("llama", **SIZE), TOKENS, max_length=8)
    with pytest.raises(ValueError, match="item 0 of task cannot be scored: an answer of 9 tokens"):
        harness.loglikelihood([ask("loglikelihood", "a", "b" * 9)])
    small = HarnessLM(tiny_decoder("llama"), TOKENS)
    with pytest.raises(ValueError, match="outside the vocabulary"):
        small.loglikelihood([ask("loglikelihood", "a", "\u00ff")])


@pytest.fixture
def unnamed():
    """A tokenizer that names neither BOS nor EOS."""
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = tokenizer.eos_token = None
    return tokenizer


def test_a_tokenizer_without_bos_and_eos_scores_what_has_a_context(unnamed):
    model = tiny_decoder("llama", **SIZE)
    lm, known = HarnessLM(model, unnamed, 2), HarnessLM(model, tiny_tokenizer(), 2)
    asked = [ask("loglikelihood", "abc", " de")]
    assert lm.loglikelihood(asked) == known.loglikelihood(asked)
    options = {"until": ["\n"], "max_gen_toks": 4}
    assert len(lm.generate_until([ask("generate_until", "abc", options)])) == 1
    with pytest.raises(ValueError, match="neither bos_token nor eos_token"):
        lm.loglikelihood([ask("loglikelihood", "", "de")])
    with pytest.raises(ValueError, match="an empty prompt cannot be continued: .* no eos_token"):
        lm.generate_until([ask("generate_until", "", options)])


@pytest.mark.parametrize(
    "harmless",
    [
        {"num_beams": 1, "repetition_penalty": 1.0, "top_p": 1.0},
        {"do_sample": False, "temperature": 0.7, "top_p": 0.9, "top_k": 0},
        {"use_cache": True, "pad_token_id": 0, "length_penalty": 2.0, "min_p": None},
    ],
)
def test_options_that_change_nothing_are_accepted(harmless):
    lm = HarnessLM(tiny_decoder("llama", **SIZE), TOKENS, 2)
    plain = {"until": [], "max_gen_toks": 4}
    answers = [
        lm.generate_until([ask("generate_until", "abc", plain | more)]) for more in ({}, harmless)
    ]
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    "other", [{"num_beams": 4}, {"repetition_penalty": 1.2}, {"do_sample": True, "top_p": 0.9}]
)
def test_options_that_would_change_answers_are_refused(other):
    lm = HarnessLM(tiny_decoder("llama", **SIZE), TOKENS, 2)
    key = list(other)[-1]
    options = {"until": [], "max_gen_toks": 4, "temperature": 1.0} | other
    with pytest.raises(ValueError, match=f"{key}.*not supported"):
        lm.generate_until([ask("generate_until", "abc", options)])
