"""GGUF: a tiny file written here, and SmolLM2's tokenizer against transformers'."""

import gguf
import numpy as np
import pytest

from idp_jax import load_model, load_tokenizer, save_model
from idp_jax.formats import resolve
from idp_jax.models.config import RopeConfig
from tests.helpers import close, needs_smollm2, tiny_decoder, tiny_ids, tiny_tokenizer

_NAMES = {
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "o": "attn_output",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
}


def _interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """Half-split rows of q or k in the order of llama.cpp: row i of a head beside row i + H / 2."""
    head_dim = rows.shape[0] // heads
    order = [i + half for i in range(head_dim // 2) for half in (0, head_dim // 2)]
    return np.ascontiguousarray(rows.reshape(heads, head_dim, -1)[:, order].reshape(rows.shape))


def _write(path, model, kind=gguf.GGMLQuantizationType.F32, **changes) -> None:
    """Writes a decoder as llama.cpp's converter would."""
    config = model.config
    writer = gguf.GGUFWriter(path, changes.get("architecture", "llama"))
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.hidden_dim)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.ffw_dim)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_epsilon)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope.theta)
    if "scaling" in changes:
        writer.add_rope_scaling_type(changes["scaling"])
    _write_tokenizer(writer)

    def add(name, values):
        values = np.asarray(values, np.float32)
        if values.ndim == 1:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)

    add("token_embd.weight", model.embedding[...])
    add("output_norm.weight", model.final_norm.scale[...])
    if model.head is not None:
        add("output.weight", model.head.dense().T)
    for layer in range(config.num_layers):
        prefix = f"blk.{layer}."
        add(prefix + "attn_norm.weight", model.layers.attention_norm.scale[layer])
        add(prefix + "ffn_norm.weight", model.layers.mlp_norm.scale[layer])
        for name in model.layers.weight_names:
            matrix = np.asarray(getattr(model.layers, name).dense()[layer]).T
            heads = {"q": config.num_heads, "k": config.num_kv_heads}.get(name)
            matrix = matrix if heads is None else _interleaved(matrix, heads)
            add(f"{prefix}{_NAMES[name]}.weight", matrix)
    for extra in changes.get("extra", ()):
        add(extra, np.ones(32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_tokenizer(writer) -> None:
    vocabulary = tiny_tokenizer().get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.get)
    merges = ["h e", "l l", "he ll"]
    tokens += [merge.replace(" ", "") for merge in merges]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)


def _model(**overrides):
    # GGUF keeps float32 numbers: a power of two is the same on both sides.
    fixed = {"vocab_size": 262, "rope": RopeConfig(500.0, "default"), "norm_epsilon": 2.0**-17}
    return tiny_decoder("llama", **fixed, **overrides)


@pytest.mark.parametrize(
    "overrides",
    [{}, {"tied_embeddings": True, "num_kv_heads": 1}, {"head_dim": 24, "num_kv_heads": 4}],
    ids=["grouped", "tied", "wide-heads"],
)
def test_float_file(tmp_path, overrides):
    model = _model(**overrides)
    _write(tmp_path / "tiny.gguf", model)
    loaded = load_model(tmp_path / "tiny.gguf")
    assert loaded.config == model.config
    assert close(loaded(tiny_ids(model)), model(tiny_ids(model)), 1e-5)


def test_quantised_file(tmp_path):
    """Eight bits a number: every matrix within its rounding, rows of q and k in their places."""
    model = _model()
    _write(tmp_path / "tiny.gguf", model, gguf.GGMLQuantizationType.Q8_0)
    loaded = load_model(tmp_path / "tiny.gguf")
    for name in model.layers.weight_names:
        exact = getattr(model.layers, name).dense()
        step = float(abs(exact).max()) / 127
        assert close(getattr(loaded.layers, name).dense(), exact, 0.51 * step + 1e-3), name


def test_tokenizer_of_the_tiny_file(tmp_path):
    _write(tmp_path / "tiny.gguf", _model())
    tokenizer, plain = load_tokenizer(tmp_path / "tiny.gguf"), tiny_tokenizer()
    assert (tokenizer.bos_token, tokenizer.eos_token_id, tokenizer.pad_token) == ("<s>", 2, "<pad>")
    assert tokenizer("hello")["input_ids"] == [261, *plain("o")["input_ids"]]
    text = "Zwölf Boxkämpfer, 3 lines\n\n<s>of text</s>"
    assert tokenizer(text)["input_ids"] == plain(text)["input_ids"]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_a_gguf_model_is_saved_as_a_folder(tmp_path):
    model = _model()
    _write(tmp_path / "tiny.gguf", model)
    out = save_model(
        load_model(tmp_path / "tiny.gguf"), tmp_path / "saved", like=tmp_path / "tiny.gguf"
    )
    again = load_model(out)
    assert again.config == model.config
    assert close(again(tiny_ids(model)), model(tiny_ids(model)), 1e-5)
    assert load_tokenizer(out)("hello")["input_ids"][0] == 261


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "gpt2"}, "'gpt2' model; only llama"),
        ({"scaling": gguf.RopeScalingType.YARN}, "rope.scaling.type' to 'yarn'"),
        ({"extra": ["rope_freqs.weight"]}, "RoPE by the tensor rope_freqs"),
        ({"extra": ["blk.0.attn_sinks.weight"]}, "'blk.0.attn_sinks.weight'"),
    ],
)
def test_what_is_not_supported_is_refused(tmp_path, changes, message):
    _write(tmp_path / "tiny.gguf", _model(), **changes)
    with pytest.raises(ValueError, match=message) as caught:
        load_model(tmp_path / "tiny.gguf")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kept", [0, 3, 200, 5_000, 200_000])
def test_a_damaged_file_is_refused(tmp_path, kept):
    _write(tmp_path / "whole.gguf", _model())
    path = tmp_path / "cut.gguf"
    path.write_bytes((tmp_path / "whole.gguf").read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"cut\.gguf is not a readable GGUF file") as caught:
        load_model(path)
    assert "\n" not in str(caught.value)


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
