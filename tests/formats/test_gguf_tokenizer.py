"""Tokenizers in GGUF metadata, against transformers' own reader of the same file."""

import json

import pytest

from idp_jax import load_tokenizer
from tests.formats.gguf_files import tiny_model, write_file

TEXTS = (
    "I'll DON'T say hello: 3.14159, 1000000 -> foo_bar(baz)",
    "  Zwölf Boxkämpfer\t\n\n<s>of</s> <think>日本語🙂</think> helloWORLD's x",
    "",
    " ",
)


@pytest.fixture(scope="module")
def trained():
    """Tokens and merges learned from words with digits, blanks and capitals among them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    corpus = ["I'll DON'T 3.14159 1000000 345 hello helloWORLD's foo_bar(baz)\n\n  x"] * 9
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<pad>", "<s>", "</s>", "<think>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    vocabulary = tokenizer.get_vocab()
    return {
        "tokenizer.ggml.tokens": sorted(vocabulary, key=vocabulary.get),
        "tokenizer.ggml.token_type": [3, 3, 3, 4] + [1] * (len(vocabulary) - 4),
        "tokenizer.ggml.merges": [
            " ".join(m) for m in json.loads(tokenizer.to_str())["model"]["merges"]
        ],
    }


KINDS, SCORES = "tokenizer.ggml.token_type", "tokenizer.ggml.scores"


def sentencepiece() -> dict:
    """A SentencePiece vocabulary with scores, bytes and two tokens that the file defines."""
    pieces = ["\u2581", "h", "e", "l", "o", "\u2581h", "ll", "\u2581he", "llo", "\u2581hello", "w"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    tokens += ["<think>", "<|end|>"]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * len(pieces), 4, 3],
        "tokenizer.ggml.scores": [*[0.0] * 259, *(-float(n) for n in range(len(pieces))), 0.0, 0.0],
        "tokenizer.ggml.merges": None,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": None,
    }


def written(folder, fields):
    path = folder / "tiny.gguf"
    write_file(path, tiny_model(), fields, weights=False)
    return path


def assert_as_transformers(path):
    pytest.importorskip("torch")
    from transformers import AutoTokenizer

    ours, theirs = (
        load_tokenizer(path),
        AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name),
    )
    for text in TEXTS:
        ids = theirs(text)["input_ids"]
        assert ours(text)["input_ids"] == ids, text
        plain = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours(text, add_special_tokens=False)["input_ids"] == plain
        assert ours.decode(ids) == theirs.decode(ids)
        assert ours.decode(ids, skip_special_tokens=True) == theirs.decode(
            ids, skip_special_tokens=True
        )
    for role in ("bos_token_id", "eos_token_id", "unk_token_id", "pad_token_id"):
        assert getattr(ours, role) == getattr(theirs, role), role


@pytest.mark.parametrize(
    "pre",
    [None, "gpt-2", "smollm", "llama-bpe", "smaug-bpe", "qwen2", "qwen35", "tekken", "gpt-4o"],
)
def test_text_is_cut_as_pre_says(tmp_path, trained, pre):
    assert_as_transformers(written(tmp_path, trained | {"tokenizer.ggml.pre": pre}))


def test_every_way_to_cut_is_that_of_transformers():
    mapping = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping")
    from idp_jax.formats.gguf_tokenizer import _SPLITS

    splits = {name: split for name, split in _SPLITS.items() if split is not None}
    assert splits == mapping.GGUF_PRE_TOKENIZER_SPLITS


@pytest.mark.parametrize("bos", [None, False, True])
@pytest.mark.parametrize("eos", [None, False, True])
@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_bos_and_eos_are_added_as_the_file_says(tmp_path, trained, model, bos, eos):
    fields = {"tokenizer.ggml.add_bos_token": bos, "tokenizer.ggml.add_eos_token": eos}
    kind = trained if model == "gpt2" else sentencepiece()
    path = written(tmp_path, kind | fields)
    assert_as_transformers(path)
    ids = load_tokenizer(path)("hello")["input_ids"]
    assert (ids[0] == 1) == (bos or (bos is None and model == "llama"))
    assert (ids[-1] == 2) == bool(eos)


def test_a_saved_tokenizer_adds_them_too(tmp_path, trained):
    from transformers import AutoTokenizer

    path = written(tmp_path, trained | {"tokenizer.ggml.add_bos_token": True})
    load_tokenizer(path).save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert again(TEXTS[0])["input_ids"] == load_tokenizer(path)(TEXTS[0])["input_ids"]
    assert again(TEXTS[0])["input_ids"][0] == 1


def test_tokens_of_the_file_stay_whole(tmp_path, trained):
    """Control tokens are special; those that the file defines are text like any other."""
    for fields in (trained, sentencepiece()):
        tokenizer = load_tokenizer(written(tmp_path, fields))
        tokens = fields["tokenizer.ggml.tokens"]
        ids = tokenizer("<think></s>", add_special_tokens=False)["input_ids"]
        assert ids[-2:] == [tokens.index("<think>"), 2]
        assert "<think>" in tokenizer.decode(ids, skip_special_tokens=True)
        assert "</s>" not in tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize(
    "fields",
    [
        {"tokenizer.ggml.model": "bert"},
        {"tokenizer.ggml.model": "t5"},
        {"tokenizer.ggml.model": None},
        {"tokenizer.ggml.pre": "deepseek-llm"},
        {"tokenizer.ggml.pre": "default"},
        {"tokenizer.ggml.tokens": None},
        {"tokenizer.ggml.merges": None},
        {"tokenizer.ggml.merges": ["he"]},
        {"tokenizer.ggml.merges": ["no such"]},
        {"tokenizer.ggml.token_type": [1]},
        sentencepiece() | {KINDS: list(map(str, sentencepiece()[KINDS]))},
        sentencepiece() | {SCORES: list(map(str, sentencepiece()[SCORES]))},
        {"tokenizer.ggml.bos_token_id": 4000},
        {"tokenizer.ggml.unknown_token_id": 2**32 - 1},
        {"tokenizer.ggml.bos_token_id": None, "tokenizer.ggml.add_bos_token": True},
        {"tokenizer.ggml.add_eos_token": 1},
        {"tokenizer.ggml.add_space_prefix": True},
        {"tokenizer.ggml.add_sep_token": True},
        {"tokenizer.ggml.remove_extra_whitespaces": True},
        {"tokenizer.ggml.precompiled_charsmap": [1, 2]},
        {"tokenizer.ggml.no_such_key": "x"},
        {"tokenizer.chat_template": 3},
        sentencepiece() | {"tokenizer.ggml.add_space_prefix": False},
        sentencepiece() | {"tokenizer.ggml.scores": [0.0]},
        sentencepiece() | {"tokenizer.ggml.pre": "llama-bpe"},
    ],
)
def test_what_cannot_be_read_as_meant_is_refused(tmp_path, fields):
    path = written(tmp_path, fields)
    with pytest.raises(ValueError) as caught:
        load_tokenizer(path)
    assert "\n" not in str(caught.value) and "tiny.gguf" in str(caught.value)


def test_keys_that_change_no_token_are_accepted(tmp_path):
    neutral = {
        "tokenizer.ggml.eot_token_id": 2,
        "tokenizer.ggml.fim_pre_token_id": 1,
        "tokenizer.ggml.mask_token_id": 1,
        "tokenizer.ggml.token_type_count": 1,
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.ggml.add_sep_token": False,
        "tokenizer.chat_template.tool_use": "x",
        "tokenizer.huggingface.json": "{}",
    }
    assert load_tokenizer(written(tmp_path, neutral))("hello")["input_ids"][0] == 261
