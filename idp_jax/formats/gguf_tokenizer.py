"""The tokenizer in a GGUF file's metadata, as a transformers fast tokenizer.

The invariant: the same tokens as transformers' own reader of the file, but without torch; a kind or
a key that neither honours is refused by name.

Source: transformers' integrations/gguf/gguf_tokenizer_mapping.py; the kinds of `tokenizer.ggml.pre`
are llama.cpp's (llama-vocab.cpp).
"""

import re
from pathlib import Path
from typing import Any

from idp_jax.formats.gguf_header import shown

_CONTROL, _USER_DEFINED = 3, 4
_PREFIX = "tokenizer.ggml."
_ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_QWEN35 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
) + _REST
_CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}|\p{{N}}{{1,3}}"
) + _REST

# How text is cut before the merges, by `tokenizer.ggml.pre`; None is GPT-2's way, and that of files
# from before the key.
_SPLITS = {
    **dict.fromkeys(("gpt-2", "phi-2", "smollm", "jina-es", "jina-de", "gigachat", "mellum")),
    **dict.fromkeys(
        ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral"), _LLAMA3
    ),
    **dict.fromkeys(("midm-2.0", "lfm2", "jina-v5-nano", "dbrx", "smaug-bpe"), _LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez"), _QWEN2),
    "qwen35": _QWEN35,
    "tekken": _TEKKEN,
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"), _GPT4O),
}
# Keys of the tokenizer that are read here, and those that leave the tokens as they are.
_READ = {
    *("model", "pre", "tokens", "token_type", "token_type_count", "scores", "merges"),
    *("add_bos_token", "add_eos_token", "add_space_prefix"),
}
_IDS = re.compile(r"[a-z_]+_token_ids?")
# Keys whose other values would change the tokens.
_OFF = ("add_sep_token", "remove_extra_whitespaces")


def build_tokenizer(path: Path, fields: dict[str, Any]):
    """The tokenizer that a GGUF file's metadata describes.

    Args:
        path: of the file, for errors.
        fields: the metadata by key.

    Raises:
        ValueError: no tokenizer, a damaged one, or one of a kind that is not supported.
    """
    _check_keys(path, fields)
    get = lambda key: fields.get(f"{_PREFIX}{key}")
    tokens, kinds = _texts(path, fields, "tokens"), get("token_type") or []
    if kinds and not _are_numbers(kinds, len(tokens), (int,)):
        raise ValueError(f"{path}: {_PREFIX}token_type does not fit its {len(tokens)} tokens")
    sentencepiece = get("model") == "llama"
    adds = {
        "add_bos_token": _flag(path, fields, "add_bos_token", sentencepiece),
        "add_eos_token": _flag(path, fields, "add_eos_token", False),
    }
    template = fields.get("tokenizer.chat_template")
    if not isinstance(template, str | None):
        raise ValueError(f"{path}: tokenizer.chat_template is {shown(template)}, which is no text")
    named = _special_tokens(path, fields, tokens)
    for role in ("bos", "eos"):
        if adds[f"add_{role}_token"] and f"{role}_token" not in named:
            raise ValueError(
                f"{path} puts a {role} token to every text, but has no {_PREFIX}{role}_token_id"
            )
    build = _sentencepiece if sentencepiece else _byte_level
    try:
        settings = {"chat_template": template, **named, **adds}
        return _wrapped(build(path, fields, tokens), tokens, kinds, settings)
    except ValueError:
        raise
    # The tokenizers library raises bare exceptions.
    except Exception as error:
        raise ValueError(
            f"the tokenizer of {path} cannot be built ({shown(str(error))}); put the model's "
            "tokenizer.json into a folder with its weights"
        ) from None


def _check_keys(path: Path, fields: dict[str, Any]) -> None:
    """Refuses what would be tokenised in another way than the file asks for."""
    model, pre = fields.get(f"{_PREFIX}model"), fields.get(f"{_PREFIX}pre")
    if model not in ("gpt2", "llama"):
        raise ValueError(
            f"{path} has a tokenizer {shown(model)} ({_PREFIX}model), which is not supported; "
            "supported: gpt2, llama"
        )
    known = (None, *_SPLITS) if model == "gpt2" else (None, "default")
    if pre not in known:
        raise ValueError(
            f"{path} cuts text by {shown(pre)} ({_PREFIX}pre), which is not supported for a "
            f"{model} tokenizer; put the model's tokenizer.json into a folder with its weights"
        )
    for key, value in fields.items():
        name = key.removeprefix(_PREFIX)
        if name == key or name in _READ or _IDS.fullmatch(name) or (name in _OFF and not value):
            continue
        raise ValueError(
            f"{path} sets {shown(key)} to {shown(value)}, which is not supported; put the model's "
            "tokenizer.json into a folder with its weights"
        )
    # A blank before every text: SentencePiece files have it, byte-level ones have not.
    prefix = _flag(path, fields, "add_space_prefix", model == "llama")
    if prefix != (model == "llama"):
        raise ValueError(
            f"{path} sets {_PREFIX}add_space_prefix to {prefix}, which is not supported for a "
            f"{model} tokenizer; put the model's tokenizer.json into a folder with its weights"
        )


def _flag(path: Path, fields: dict[str, Any], name: str, default: bool) -> bool:
    value = fields.get(f"{_PREFIX}{name}", default)
    if not isinstance(value, bool):
        raise ValueError(f"{path}: {_PREFIX}{name} is {shown(value)}, neither true nor false")
    return value


def _texts(path: Path, fields: dict[str, Any], name: str) -> list[str]:
    """A list of strings, which must be there."""
    value = fields.get(f"{_PREFIX}{name}")
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise ValueError(f"{path} has no list of texts {_PREFIX}{name}; fetch it again")
    return value


def _are_numbers(value: Any, count: int, kinds: tuple[type, ...]) -> bool:
    fits = isinstance(value, list) and len(value) == count
    return fits and all(type(entry) in kinds for entry in value)


def _merges(path: Path, fields: dict[str, Any]) -> list[tuple[str, str]]:
    merges = []
    for merge in _texts(path, fields, "merges"):
        left, blank, right = merge.partition(" ")
        if not blank:
            raise ValueError(f"{path}: {_PREFIX}merges has {shown(merge)}, which is no two parts")
        merges.append((left, right))
    return merges


def _special_tokens(path: Path, fields: dict[str, Any], tokens: list[str]) -> dict[str, str]:
    named = {}
    for role, key in _ROLES.items():
        index = fields.get(f"{_PREFIX}{key}_token_id")
        if index is None:
            continue
        if type(index) is not int or not 0 <= index < len(tokens):
            raise ValueError(
                f"{path}: {_PREFIX}{key}_token_id is {shown(index)}, but there are {len(tokens)} "
                "tokens"
            )
        named[f"{role}_token"] = tokens[index]
    return named


def _byte_level(path: Path, fields: dict[str, Any], tokens: list[str]):
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    merges = _merges(path, fields)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    split = _SPLITS[fields.get(f"{_PREFIX}pre", "gpt-2")]
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if split is not None:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(split), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(path: Path, fields: dict[str, Any], tokens: list[str]):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers.tokenization_utils_base import generate_merges

    vocabulary = {token: index for index, token in enumerate(tokens)}
    if f"{_PREFIX}merges" in fields:
        merges = _merges(path, fields)
    else:
        scores: Any = fields.get(f"{_PREFIX}scores")
        if not _are_numbers(scores, len(tokens), (int, float)):
            raise ValueError(f"{path}: {_PREFIX}scores does not fit its {len(tokens)} tokens")
        merges = generate_merges(vocabulary, dict(zip(tokens, scores, strict=True)))
    model = models.BPE(vocab=vocabulary, merges=merges, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    return tokenizer


def _wrapped(tokenizer, tokens: list[str], kinds: list[int], settings: dict[str, Any]):
    """Adds the tokens that are found whole in a text, and gives the rest to transformers."""
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    added = [
        AddedToken(token, special=kind == _CONTROL, normalized=False)
        for token, kind in zip(tokens, kinds or [None] * len(tokens), strict=True)
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    tokenizer.add_special_tokens([token for token in added if token.special])
    tokenizer.add_tokens([token for token in added if not token.special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        **settings,
    )
