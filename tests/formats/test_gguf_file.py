"""GGUF: a tiny file written here, and SmolLM2's tokenizer against transformers'."""

import struct

import gguf
import numpy as np
import pytest

from idp_jax import load_model, load_tokenizer, save_model
from idp_jax.formats import resolve
from tests.formats.gguf_files import tiny_model, write_file
from tests.helpers import close, needs_smollm2, tiny_ids, tiny_tokenizer


@pytest.mark.parametrize(
    "overrides",
    [{}, {"tied_embeddings": True, "num_kv_heads": 1}, {"head_dim": 24, "num_kv_heads": 4}],
    ids=["grouped", "tied", "wide-heads"],
)
def test_float_file(tmp_path, overrides):
    model = tiny_model(**overrides)
    write_file(tmp_path / "tiny.gguf", model)
    loaded = load_model(tmp_path / "tiny.gguf")
    assert loaded.config == model.config
    assert close(loaded(tiny_ids(model)), model(tiny_ids(model)), 1e-5)


def test_quantised_file(tmp_path):
    """Eight bits a number: every matrix within its rounding, rows of q and k in their places."""
    model = tiny_model()
    write_file(tmp_path / "tiny.gguf", model, kind=gguf.GGMLQuantizationType.Q8_0)
    loaded = load_model(tmp_path / "tiny.gguf")
    for name in model.layers.weight_names:
        exact = getattr(model.layers, name).dense()
        step = float(abs(exact).max()) / 127
        assert close(getattr(loaded.layers, name).dense(), exact, 0.51 * step + 1e-3), name


def test_tokenizer_of_the_tiny_file(tmp_path):
    write_file(tmp_path / "tiny.gguf", tiny_model())
    tokenizer, plain = load_tokenizer(tmp_path / "tiny.gguf"), tiny_tokenizer()
    assert (tokenizer.bos_token, tokenizer.eos_token_id, tokenizer.pad_token) == ("<s>", 2, "<pad>")
    assert tokenizer("hello")["input_ids"] == [261, *plain("o")["input_ids"]]
    text = "Zwölf Boxkämpfer, 3 lines\n\n<s>of text</s>"
    assert tokenizer(text)["input_ids"] == plain(text)["input_ids"]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_a_gguf_model_is_saved_as_a_folder(tmp_path):
    model = tiny_model()
    write_file(tmp_path / "tiny.gguf", model)
    out = save_model(
        load_model(tmp_path / "tiny.gguf"), tmp_path / "saved", like=tmp_path / "tiny.gguf"
    )
    again = load_model(out)
    assert again.config == model.config
    assert close(again(tiny_ids(model)), model(tiny_ids(model)), 1e-5)
    assert load_tokenizer(out)("hello")["input_ids"][0] == 261


def refused(path, *words):
    with pytest.raises(ValueError) as caught:
        load_model(path)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in (path.name, *words)), message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "gpt2"}, "'gpt2' model; only llama"),
        ({"tensors": ("rope_freqs.weight",)}, "RoPE by the tensor rope_freqs"),
        ({"tensors": ("blk.0.attn_sinks.weight",)}, "'blk.0.attn_sinks.weight'"),
        ({"tensors": ("blk.2.attn_norm.weight",)}, "layers.2.input_layernorm"),
    ],
)
def test_what_is_not_supported_is_refused(tmp_path, changes, message):
    write_file(tmp_path / "tiny.gguf", tiny_model(), **changes)
    refused(tmp_path / "tiny.gguf", message)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.rope.scaling.type", "yarn"),
        ("llama.rope.scaling.type", "longrope"),
        ("llama.rope.scaling.factor", 4.0),
        ("llama.rope.scaling.attn_factor", 0.5),
        ("llama.rope.scaling.yarn_beta_fast", 32.0),
        ("llama.rope.freq_base_swa", 10000.0),
        ("llama.rope.dimension_sections", [8, 8]),
        ("llama.attention.sliding_window", 4096),
        ("llama.attention.causal", False),
        ("llama.attention.scale", 0.5),
        ("llama.attention.clamp_kqv", 8.0),
        ("llama.attention.max_alibi_bias", 8.0),
        ("llama.attention.key_length", 32),
        ("llama.attention.value_length", 8),
        ("llama.attention.head_count_kv", [1, 2]),
        ("llama.attention.layer_norm_epsilon", 1e-5),
        ("llama.final_logit_softcapping", 30.0),
        ("llama.logit_scale", 0.25),
        ("llama.residual_scale", 0.25),
        ("llama.embedding_scale", 12.0),
        ("llama.expert_count", 8),
        ("llama.use_parallel_residual", True),
        ("llama.no_such_key", 0),
        ("general.type", "adapter"),
        ("split.count", 3),
    ],
)
def test_a_key_that_changes_the_model_is_refused_by_name(tmp_path, key, value):
    write_file(tmp_path / "tiny.gguf", tiny_model(), {key: value}, weights=False)
    refused(tmp_path / "tiny.gguf", key.removeprefix("llama."))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.block_count", None),
        ("llama.block_count", 0),
        ("llama.block_count", 2_000_000_000),
        ("llama.embedding_length", 1_000_000),
        ("llama.feed_forward_length", 32),
        ("llama.attention.head_count", "4"),
        ("llama.attention.head_count", 0),
        ("llama.attention.head_count_kv", 3),
        ("llama.attention.layer_norm_rms_epsilon", float("nan")),
        ("llama.rope.freq_base", float("inf")),
        ("llama.rope.freq_base", 0.0),
        ("llama.rope.dimension_count", 7),
        ("llama.context_length", True),
        ("llama.vocab_size", 4000),
        ("tokenizer.ggml.bos_token_id", 262),
        ("tokenizer.ggml.eos_token_id", 2**32 - 1),
        ("tokenizer.ggml.padding_token_id", "<pad>"),
        ("general.architecture", None),
    ],
)
def test_a_key_with_an_impossible_value_is_refused(tmp_path, key, value):
    architecture = {"architecture": "x"} if key == "general.architecture" else {}
    fields = {} if architecture else {key: value}
    write_file(tmp_path / "tiny.gguf", tiny_model(), fields, **architecture)
    refused(tmp_path / "tiny.gguf")


def test_keys_that_change_nothing_are_accepted(tmp_path):
    model = tiny_model()
    neutral = {
        "general.type": "model",
        "general.name": "tiny",
        "general.quantization_version": 2,
        "general.sampling.temp": 0.7,
        "general.tags": ["text"],
        "quantize.imatrix.entries_count": 7,
        "split.count": 1,
        "llama.vocab_size": 262,
        "llama.rope.scaling.type": "none",
        "llama.rope.scaling.factor": 1.0,
        "llama.rope.scaling.original_context_length": 64,
        "llama.rope.scale_linear": 1.0,
        "llama.attention.key_length": model.config.head_dim,
        "llama.attention.value_length": model.config.head_dim,
        "llama.attention.causal": True,
        "llama.expert_count": 0,
        "llama.tensor_data_layout": "Meta AI original pth",
    }
    write_file(tmp_path / "tiny.gguf", model, neutral)
    loaded = load_model(tmp_path / "tiny.gguf")
    assert loaded.config == model.config
    assert close(loaded(tiny_ids(model)), model(tiny_ids(model)), 1e-5)


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_0"])
def test_numbers_that_are_not_finite_are_counted(tmp_path, kind):
    """Packed ones come from a scale, whose whole block of 32 is lost."""
    kind, path = gguf.GGMLQuantizationType[kind], tmp_path / "tiny.gguf"
    write_file(path, tiny_model(), kind=kind)
    tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == "blk.1.ffn_up.weight")
    content = bytearray(path.read_bytes())
    infinity = np.array([np.inf], np.float32 if kind.name == "F32" else np.float16).tobytes()
    content[tensor.data_offset : tensor.data_offset + len(infinity)] = infinity
    path.write_bytes(content)
    refused(path, "blk.1.ffn_up.weight", "32 numbers" if kind.name[0] == "Q" else "1 numbers")


@pytest.mark.parametrize("kept", [0, 3, 200, 5_000, 200_000])
def test_a_damaged_file_is_refused(tmp_path, kept):
    write_file(tmp_path / "whole.gguf", tiny_model())
    path = tmp_path / "cut.gguf"
    path.write_bytes((tmp_path / "whole.gguf").read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"cut\.gguf is not a readable GGUF file") as caught:
        load_model(path)
    assert "\n" not in str(caught.value)


def test_a_file_of_the_other_byte_order_is_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "big.gguf", "llama", endianess=gguf.GGUFEndian.BIG)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    refused(tmp_path / "big.gguf", "big-endian")


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def entry(key: str, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


@pytest.mark.parametrize(
    ("counts", "body", "message"),
    [
        ((2**60, 0), b"", "it ends"),
        ((0, 2**60), b"", "it ends"),
        ((0, 1), struct.pack("<Q", 2**62), "it ends"),
        ((0, 1), entry("a", 9, struct.pack("<IQ", 4, 2**61)), "it ends"),
        ((0, 1), entry("a", 9, struct.pack("<IQ", 8, 2**61)), "it ends"),
        ((0, 1), entry("a", 9, struct.pack("<IQ", 9, 1) * 50_000), "unknown type 9"),
        ((0, 1), entry("a", 77, b""), "unknown type 77"),
        ((0, 2), entry("a", 0, b"1") * 2, "key 'a' twice"),
        ((0, 1), entry("a", 8, struct.pack("<Q", 2) + b"\xff\xfe"), "no UTF-8"),
        ((0, 1), entry("general.alignment", 4, struct.pack("<I", 0)), "no power of two"),
        ((1, 0), string("t") + struct.pack("<IQIQ", 1, 2**50, 0, 0), "does not lie within"),
        ((1, 0), string("t") + struct.pack("<IQIQ", 1, 8, 0, 2**63), "does not lie within"),
        ((1, 0), string("t") + struct.pack("<I", 2**31), "it ends"),
        ((1, 0), string("t") + struct.pack("<IQIQ", 1, 31, 8, 0), "impossible shape"),
        ((1, 0), string("t") + struct.pack("<IQIQ", 1, 8, 99, 0), "unknown type 99"),
        (
            (2, 0),
            b"".join(string(t) + struct.pack("<IQIQ", 1, 8, 0, 0) for t in "ab") + b"\0" * 96,
            "lies over another",
        ),
    ],
)
def test_a_hostile_head_is_refused_at_once(tmp_path, counts, body, message):
    path = tmp_path / "hostile.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, *counts) + body)
    refused(path, message)


PARAGRAPH = """In 1969, 600 million people watched; by 2024 it was 5,300,000,000 (+783 %).
\tIndented:  two  spaces, tabs\tand trailing blanks   \n\n
Naïve café – “quotes” … 日本語 हिन्दी 🙂👩‍🚀 Ωmega\u00a0nbsp
<|im_start|>user\nWhat's 12x34? I'll say it's 408.<|im_end|>
<|endoftext|>def f(x): return x**2  # 1234567890
"""


@needs_smollm2
def test_smollm2_tokenizer_equals_transformers():
    pytest.importorskip("torch")
    from transformers import AutoTokenizer

    path = resolve("smollm2-135m")
    ours = load_tokenizer("smollm2-135m")
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in (PARAGRAPH, *PARAGRAPH.splitlines(), "", " ", "\n"):
        ids = theirs(text)["input_ids"]
        assert ours(text)["input_ids"] == ids
        assert ours.decode(ids) == theirs.decode(ids)
        assert ours.decode(ids, skip_special_tokens=True) == theirs.decode(
            ids, skip_special_tokens=True
        )
    for role in ("bos_token", "eos_token", "unk_token", "pad_token"):
        assert getattr(ours, role) == getattr(theirs, role)
    messages = [{"role": "user", "content": "Hello"}]
    assert ours.apply_chat_template(messages, tokenize=False) == theirs.apply_chat_template(
        messages, tokenize=False
    )
