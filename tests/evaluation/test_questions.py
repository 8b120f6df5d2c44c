"""One prompt a question, and what becomes of items that cannot be scored."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idp_jax.evaluation.harness import HarnessLM
from idp_jax.evaluation.harness_tasks import evaluate
from idp_jax.evaluation.perplexity import perplexity
from idp_jax.inference import generate
from idp_jax.recover import Pool, Repaired, SoftPrompt
from tests.evaluation.test_harness import TOKENS, ask, plain_score
from tests.evaluation.test_task_data import ROW, write_rows
from tests.helpers import tiny_decoder, tiny_ids, tiny_tokenizer

SIZE = {"vocab_size": 259, "max_positions": 512}


def by_parity(inputs):
    """Chooses by the number of tokens that count, so that one more token chooses otherwise."""
    odd = (inputs.real.sum(-1) % 2).astype(jnp.float32)
    return jnp.stack([1 - odd, odd], -1)


@pytest.fixture(scope="module", params=["llama", "opt"])
def pool(request):
    model = tiny_decoder(request.param, **SIZE)
    prompts = [SoftPrompt.init(model, n, jax.random.key(n)) for n in (3, 5)]
    return Pool(prompts, by_parity).repair(model)


# Contexts that differ in length and parity: what they share has 5 tokens, or 4, or none.
OPTIONS = [("she, Ann", " left", 0), ("she, Bob", " left", 0), ("she, B", " left", 0)]
OPTIONS += [("The x", " ends", 1), ("The yy", " ends", 1), ("abc", " d", 2), ("xy", " d", 2)]
SHARED = {0: "she, ", 1: "The ", 2: "<s>"}


@pytest.mark.parametrize(("batch_size", "turned"), [(8, False), (2, True)])
def test_options_that_differ_in_context_have_one_prompt(pool, batch_size, turned):
    asked = [ask("loglikelihood", a, b, doc=doc) for a, b, doc in OPTIONS]
    harness = HarnessLM(pool, TOKENS, batch_size)
    order = slice(None, None, -1 if turned else 1)
    answers = harness.loglikelihood(asked[order])[order]
    for (context, text, doc), answer in zip(OPTIONS, answers, strict=True):
        chooser = TOKENS.encode(SHARED[doc])
        found = plain_score(pool, TOKENS.encode(context), TOKENS.encode(text), chooses=chooser)
        assert answer == (pytest.approx(found[0], abs=1e-4), found[1])
        assert harness.choices["task"][doc] == [len(chooser) % 2]


def test_answers_that_are_cut_differently_have_one_prompt(pool):
    """The longer answer leaves less room to the context; the choice is made from the smaller."""
    harness = HarnessLM(pool, TOKENS, 4, max_length=12)
    asked = [ask("loglikelihood", "a long context", text) for text in ("x", "four")]
    answers = harness.loglikelihood(asked)
    ids, chooser = TOKENS.encode("a long context"), TOKENS.encode("a long context")[-9:]
    for answer, text in zip(answers, ("x", "four"), strict=True):
        room = 13 - len(text)
        expected = plain_score(pool, ids[-room:], TOKENS.encode(text), chooses=chooser)
        assert answer[0] == pytest.approx(expected[0], abs=1e-4)
    assert harness.choices["task"] == {0: [1]}


def test_options_without_a_context_are_a_question_of_their_own(pool):
    """A mutual information asks for the answers alone too, of the same item."""
    texts = [("Why?", " a"), ("Why?", " b"), ("", " a"), ("", " b")]
    harness = HarnessLM(pool, TOKENS, 4)
    harness.loglikelihood([ask("loglikelihood", *pair) for pair in texts])
    assert sorted(harness.choices["task"][0]) == [0, 1]


@pytest.fixture
def data(tmp_path):
    sentences = ["It was _ who left.", "So Ann and _ stayed on.", "_ came."]
    rows = [{"sentence": s, "option1": "Al", "option2": "Bea", "answer": "1"} for s in sentences]
    write_rows(tmp_path / "arc_easy" / "test.jsonl", 5)
    (tmp_path / "winogrande").mkdir()
    file = tmp_path / "winogrande" / "validation.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_results_say_the_prompt_of_every_item(pool, data):
    found = evaluate(pool, tiny_tokenizer(), tasks=["winogrande", "arc_easy"], task_data=data)
    # The option's own tokens count for nothing: "It was ", "So Ann and ", and no text at all.
    assert found.tasks["winogrande"].prompts == [[1], [1], [1]]
    assert found.tasks["winogrande"].choices == [0, 3]
    row = found.tasks["arc_easy"]
    assert len(row.prompts) == row.items == 5 and sum(row.choices) == 5


def test_an_answer_that_is_too_long_is_refused_alone(pool, data):
    whole = evaluate(pool, tiny_tokenizer(), tasks=["arc_easy"], task_data=data)
    long = {**ROW, "choices": {"text": ["no", "y" * 600], "label": ["A", "B"]}}
    with (data / "arc_easy" / "test.jsonl").open("a") as file:
        file.write(json.dumps({**long, "id": "5"}) + "\n")
    found = evaluate(pool, tiny_tokenizer(), tasks=["arc_easy"], task_data=data)
    row = found.tasks["arc_easy"]
    assert row.items == 5 and list(row.refused) == [5]
    assert "an answer of 601 tokens; only 1 to" in row.refused[5]
    assert row.samples == whole.tasks["arc_easy"].samples
    assert row.metrics == whole.tasks["arc_easy"].metrics
    with pytest.raises(ValueError, match="no item of task arc_easy can be scored; item 0: an ans"):
        evaluate(pool, tiny_tokenizer(), tasks=["arc_easy"], task_data=data, max_length=3)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("task", ["arc_easy", "triviaqa", "wikitext"])
def test_a_model_that_cannot_be_computed_with_has_no_accuracy(data, task, bad):
    question = {"question": "Who", "answer": {"aliases": ["Nobody"], "value": "Nobody"}}
    write_rows(data / "triviaqa" / "validation.jsonl", 2, question)
    write_rows(data / "wikitext2" / "test.jsonl", 2, {"page": "A page of text."})
    model = tiny_decoder("llama", **SIZE)
    model.embedding = model.embedding[...].at[:, 3].set(bad)
    with pytest.raises(ValueError, match="numbers that cannot be computed with") as error:
        evaluate(model, tiny_tokenizer(), tasks=[task], task_data=data)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="the loss of window 0 is nan"):
        perplexity(Repaired.of(model), np.asarray(tiny_ids(model, 3, 8)), 2)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_generated_answer_that_cannot_be_computed_is_refused_alone(batch_size):
    """Wherever its row stands: the likeliest of such logits is a token like any other."""
    model = tiny_decoder("llama", **SIZE)
    model.embedding = model.embedding[...].at[TOKENS.encode("#")[0]].set(jnp.nan)
    asked = [
        ask("generate_until", text, {"until": ["."], "max_gen_toks": 3}, doc=doc)
        for doc, text in enumerate(["a b", "a # b", "c", "#"])
    ]
    harness = HarnessLM(model, TOKENS, batch_size, skip=True)
    answers = harness.generate_until(asked)
    assert list(harness.refused["task"]) == [1, 3]
    assert "logits behind it are not finite" in harness.refused["task"][1]
    good = HarnessLM(model, TOKENS, batch_size).generate_until(asked[::2])
    assert answers[::2] == good
    with pytest.raises(ValueError, match="item 1 of task cannot be scored"):
        HarnessLM(model, TOKENS, batch_size).generate_until(asked)


@pytest.mark.parametrize("bad", [jnp.nan, -jnp.inf])
def test_a_selector_that_gives_no_number_has_no_accuracy(pool, bad):
    """The largest of scores that are not numbers would be a prompt like any other."""
    three = lambda inputs: inputs.real.sum(-1)[:, None] == 3
    repaired = pool.with_selector(lambda x: jnp.where(three(x), bad, by_parity(x)))
    harness = HarnessLM(repaired, TOKENS, 4, skip=True)
    asked = [ask("loglikelihood", text, " x", doc=doc) for doc, text in enumerate(["ab", "abc"])]
    asked += [
        ask("generate_until", text, {"until": ["."], "max_gen_toks": 2}, doc=doc)
        for doc, text in enumerate(["ab", "abc"], 2)
    ]
    harness.loglikelihood(asked[:2])
    harness.generate_until(asked[2:])
    assert list(harness.refused["task"]) == [1, 3] and list(harness.choices["task"]) == [0, 2]
    with pytest.raises(ValueError, match="the loss of window 0 is nan: .* selector"):
        perplexity(repaired, np.asarray(tiny_ids(repaired.decoder, 3, 3)), 2)
    with pytest.raises(ValueError, match="logits behind prompt 1 of 2 are not finite"):
        generate(repaired, ["ab", "abc"], tokenizer=TOKENS, max_new_tokens=2)


def test_a_perplexity_too_large_for_a_float_is_no_error(data):
    """Where the mean loss is above 709 the harness's own exp would end the evaluation."""
    write_rows(data / "wikitext2" / "test.jsonl", 2, {"page": "Apageofonewordofmanytokens" * 8})
    model = tiny_decoder("llama", **SIZE)
    model.head.kernel = model.head.kernel[...] * 1000
    found = evaluate(model, tiny_tokenizer(), tasks=["wikitext"], task_data=data)
    assert found.tasks["wikitext"].metrics["word_perplexity"] == float("inf")
    text = perplexity(model, np.asarray(tiny_ids(model, 3, 8)), 2)
    assert text.mean_nll > 709 and text.perplexity == float("inf")


@pytest.mark.parametrize(("limit", "items"), [(0.5, 3), (0.01, 1), (2, 2)])
def test_a_limit_is_a_number_or_a_fraction(data, limit, items):
    model = tiny_decoder("llama", **SIZE)
    found = evaluate(model, tiny_tokenizer(), tasks=["arc_easy"], task_data=data, limit=limit)
    assert found.tasks["arc_easy"].items == items
