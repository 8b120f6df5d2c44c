"""Tokens of a text in pieces are those of the whole text, whatever the tokenizer and the text."""

import json
import random
from functools import cache

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from idp_jax.data import tokens as module
from idp_jax.data.tokens import token_ids
from tests.datasets import DATA, needs_data
from tests.helpers import needs_smollm2

_WORDS = (
    "the of and in to was it's 1984 2,500 naïve café ( ) . , ! -- 漢字 😀 👩‍👩‍👧 = @-@ x_y"
).split(" ")
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def prose(words: int, seed: int = 0) -> str:
    """Words, invented and real, with blanks and line ends of every kind."""
    rng = random.Random(seed)
    invented = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(1, 9))) for _ in range(400)]
    parts = []
    for _ in range(words):
        parts.append(rng.choice(invented if rng.random() < 0.8 else _WORDS))
        parts.append(rng.choices([" ", "  ", "\n", "\n\n", "", " " * 9], [90, 2, 3, 2, 3, 1])[0])
    return "".join(parts)


def _byte_level(kind: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=kind == "llama3"))
    bytes_alone = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = (
        pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(_LLAMA3), "isolated"), bytes_alone])
        if kind == "llama3"
        else pre_tokenizers.ByteLevel(add_prefix_space=kind == "prefixed")
    )
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([prose(4000, seed=1)], trainer)
    tokenizer.post_processor = (
        processors.RobertaProcessing(("</s>", 1), ("<s>", 0), trim_offsets=True)
        if kind == "opt"
        else processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    )
    return tokenizer


def _sentencepiece(kind: str) -> Tokenizer:
    """A BPE that takes the whole text for one word, in the two forms that LLaMA's is stored in."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=special, limit_alphabet=60, show_progress=False
    )
    tokenizer.train_from_iterator([prose(4000, seed=1)], trainer)
    stored = json.loads(tokenizer.to_str()) | {"pre_tokenizer": None}
    tokenizer = Tokenizer.from_str(json.dumps(stored))
    if kind == "metaspace":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def _unigram(kind: str) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=600, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator([prose(4000, seed=1)], trainer)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=kind == "unigram")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return tokenizer


def _bert(kind: str) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=600, special_tokens=["[UNK]", "[CLS]", "[SEP]"], show_progress=False
    )
    tokenizer.train_from_iterator([prose(4000, seed=1)], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return tokenizer


KINDS = {
    "gpt2": _byte_level,
    "prefixed": _byte_level,
    "opt": _byte_level,
    "llama3": _byte_level,
    "llama": _sentencepiece,
    "metaspace": _sentencepiece,
    "unigram": _unigram,
    "unigram of the whole text": _unigram,
    "bert": _bert,
}


@cache
def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    """A small tokenizer of a kind that models have."""
    return PreTrainedTokenizerFast(tokenizer_object=KINDS[kind](kind))


@pytest.fixture(params=KINDS)
def tokenizer(request):
    """One tokenizer of every kind."""
    return tokenizer_of(request.param)


@pytest.fixture
def small_pieces(monkeypatch):
    """Pieces so short that a text of a test has many."""
    monkeypatch.setattr(module, "_PIECE", 3000)
    monkeypatch.setattr(module, "_OVERLAP", 512)
    monkeypatch.setattr(module, "_MARGIN", 128)


def pathological(size: int) -> dict[str, str]:
    """Texts that are hard to cut."""
    rng = random.Random(2)
    several = lambda choices: "".join(rng.choices(choices, k=size))
    return {
        "one letter": "a" * size,
        "a period": "abcab" * (size // 5),
        "one long word": several("etaoinshrdlu"),
        "digits": several("0123456789"),
        "spaces": " " * size,
        "spaces in front of a special token": "x" + " " * size + "<s> y",
        "white space": several(" \n\t\u3000\xa0"),
        "emoji": "".join(rng.choices(["😀", "👩‍👩‍👧‍👦", "🏳️‍🌈", "🇩🇪", "👍🏽"], k=size // 4)),
        "ideographs": "".join(chr(rng.randrange(0x4E00, 0x9FA5)) for _ in range(size)),
        "signs": several("!'.,-_=*#st"),
        "special tokens": "".join(rng.choices(["<s>", "</s>", "a", " ", "the "], k=size // 4)),
        "combining marks": "e" + "\u0301\u0300" * (size // 2),
    }


def same(tokenizer, pieces) -> int:
    """Checks the ids of a text in pieces; returns how many arrays they came in."""
    found = list(token_ids(tokenizer, iter(pieces)))
    whole = tokenizer("".join(pieces), verbose=False)["input_ids"]
    assert np.array_equal(np.concatenate(found), np.asarray(whole, np.int32))
    assert {part.dtype for part in found} == {np.dtype(np.int32)}
    return len(found)


@pytest.mark.usefixtures("small_pieces")
def test_prose_in_pieces(tokenizer):
    text = prose(12_000)
    parts = same(tokenizer, [text])
    cannot = tokenizer is tokenizer_of("unigram of the whole text")
    assert parts == 1 if cannot else parts > 15


@pytest.mark.usefixtures("small_pieces")
def test_how_the_pieces_come_has_no_effect(tokenizer):
    text, rng = prose(5000, seed=3), random.Random(3)
    places = sorted(rng.randrange(len(text)) for _ in range(300))
    cuts = zip([0, *places], [*places, len(text)], strict=True)
    same(tokenizer, [text[start:end] for start, end in cuts])


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("name", pathological(1))
def test_pathological_texts(tokenizer, name):
    same(tokenizer, [pathological(20_000)[name]])


@pytest.mark.slow
@pytest.mark.parametrize("name", pathological(1))
def test_pathological_texts_of_a_million_characters(tokenizer, name):
    same(tokenizer, [prose(100), pathological(10**6)[name], prose(100)])


@pytest.mark.parametrize("text", ["", "a", "\n\n"])
def test_short_texts(tokenizer, text):
    assert same(tokenizer, [text]) == 1
    assert same(tokenizer, [text, ""]) == 1


@needs_data
@pytest.mark.parametrize("pieces", [None, "small_pieces"])
def test_wikitext(tokenizer, pieces, request):
    if pieces:
        request.getfixturevalue(pieces)
    text = (DATA / "wikitext2" / "wiki.valid.raw").read_text(encoding="utf-8")
    same(tokenizer, [text[: 200_000 if pieces else None]])


@needs_data
@needs_smollm2
def test_wikitext_with_a_published_tokenizer():
    from idp_jax import load_tokenizer

    text = (DATA / "wikitext2" / "wiki.test.raw").read_text(encoding="utf-8")
    assert same(load_tokenizer("smollm2-135m"), [text]) > 15


@pytest.mark.usefixtures("small_pieces")
def test_no_more_is_read_than_is_asked_for():
    read = []

    def pieces():
        for number in range(1000):
            read.append(number)
            yield prose(100, seed=number)

    next(token_ids(tokenizer_of("gpt2"), pieces()))
    assert len(read) < 20


def test_a_tokenizer_that_knows_no_places_takes_the_whole_text():
    class Letters:
        def __call__(self, text, verbose=True):
            return {"input_ids": [ord(character) for character in text]}

    found = list(token_ids(Letters(), ["a" * 10**5, "b"]))
    assert len(found) == 1 and found[0].tolist() == [97] * 10**5 + [98]
