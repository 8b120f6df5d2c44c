"""Adapters on disk: what is written is read back, PEFT reads it too, and damage is named."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from idp_jax import load_adapter, load_model
from idp_jax.formats import save_adapter
from idp_jax.formats.adapters import read_adapter
from idp_jax.models.matrices import matrices
from idp_jax.recover import LoraAdapter, Pool, PrefixAdapter
from idp_jax.recover.selectors import fixed_scores
from tests.helpers import hf_config, tiny_decoder, write_folder
from tests.recover.test_adapters import random_lora, random_prompt

KINDS = ("prompt", "prefix", "cartridge", "deep", "lora", "pool")


def random_adapter(kind: str, model):
    """An adapter of every kind, none of its numbers 0."""
    config = model.config
    if kind == "prompt":
        return random_prompt(model, 5)
    if kind in ("prefix", "cartridge", "deep"):
        shape = (2, config.num_layers, 5, config.num_kv_heads, config.head_dim)
        k, v = jnp.asarray(np.random.default_rng(2).normal(0, 1, shape), "float32")
        lengths = (5, *range(config.num_layers - 1)) if kind == "deep" else None
        return PrefixAdapter(k, v, 0 if kind == "prefix" else 2, lengths)
    if kind == "lora":
        return random_lora(model, ("q", "v", "o", "up"))
    prompts = [random_prompt(model, 3), random_prompt(model, 7, seed=1)]
    return Pool(prompts, "sum_attention")


def same(first, second) -> bool:
    """Whether two adapters are one, bit for bit, settings included."""
    x, y = jax.tree.flatten(first), jax.tree.flatten(second)
    return x[1] == y[1] and all(
        (np.asarray(a) == np.asarray(b)).all() for a, b in zip(x[0], y[0], strict=True)
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_round_trip(tmp_path, name, kind):
    model = tiny_decoder(name, **({"embedding_dim": 32} if name == "opt" else {}))
    adapter = random_adapter(kind, model)
    folder = save_adapter(adapter, tmp_path / "adapter", decoder=model, base="some/model")
    found = read_adapter(model, folder)
    assert type(found) is type(adapter)
    assert same(found, adapter)
    with pytest.raises(ValueError, match="exists; give another folder"):
        save_adapter(adapter, folder, decoder=model)
    save_adapter(adapter, folder, decoder=model, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def written(tmp_path, kind: str, name: str = "llama"):
    """A saved adapter: the model, its folder, its settings and tensors."""
    model = tiny_decoder(name)
    folder = save_adapter(
        random_adapter(kind, model), tmp_path / kind, decoder=model, base="some/model"
    )
    settings = json.loads((folder / "adapter_config.json").read_text())
    return model, folder, settings, load_file(folder / "adapter_model.safetensors")


def test_prompt_files(tmp_path):
    _, _, settings, tensors = written(tmp_path, "prompt")
    assert {name: x.shape for name, x in tensors.items()} == {"prompt_embeddings": (5, 64)}
    wanted = {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 5}
    wanted |= {"token_dim": 64, "num_layers": 2, "num_attention_heads": 4}
    wanted |= {"num_transformer_submodules": 1, "base_model_name_or_path": "some/model"}
    assert settings.items() >= wanted.items()


def test_prefix_files(tmp_path):
    model, _, settings, tensors = written(tmp_path, "prefix")
    flat = tensors["prompt_embeddings"]
    assert flat.shape == (5, 2 * 2 * 2 * 16)  # layers, keys and values, kv heads, head width
    adapter = random_adapter("prefix", model)
    table = flat.reshape(5, 4, 2, 16)
    for layer in range(2):
        assert (table[:, 2 * layer] == np.asarray(adapter.k[...])[layer]).all()
        assert (table[:, 2 * layer + 1] == np.asarray(adapter.v[...])[layer]).all()
    wanted = {"peft_type": "PREFIX_TUNING", "token_dim": 32, "num_attention_heads": 2}
    assert settings.items() >= wanted.items() and not settings["prefix_projection"]


def test_cartridge_files(tmp_path):
    _, _, settings, tensors = written(tmp_path, "cartridge")
    assert {name: x.shape for name, x in tensors.items()} == {"prompt_embeddings": (5, 128)}
    wanted = {"peft_type": "CARTRIDGE", "token_dim": 32, "num_frozen_tokens": 2}
    assert settings.items() >= wanted.items()


def test_files_of_a_length_for_every_layer(tmp_path):
    """PEFT has no such form: a type that it does not know keeps it from reading another."""
    _, folder, settings, tensors = written(tmp_path, "deep")
    assert tensors["prompt_embeddings"].shape == (5, 128)
    wanted = {"peft_type": "IDP_DEEP_PREFIX", "layer_lengths": [5, 0], "num_frozen_tokens": 2}
    assert settings.items() >= wanted.items()
    peft = pytest.importorskip("peft")
    with pytest.raises((KeyError, ValueError), match="IDP_DEEP_PREFIX"):
        peft.PeftConfig.from_pretrained(folder)


@pytest.mark.parametrize(
    ("name", "stem", "modules"),
    [
        ("llama", "model.layers", ["self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj"]),
        ("opt", "model.decoder.layers", ["self_attn.q_proj", "self_attn.out_proj", "fc1"]),
    ],
)
def test_lora_files(tmp_path, name, stem, modules):
    model, _, settings, tensors = written(tmp_path, "lora", name)
    lora = random_adapter("lora", model)
    for matrix, module in zip(("q", "o", "up"), modules, strict=True):
        key = f"base_model.model.{stem}.1.{module}"
        inputs, outputs = next(
            (m.inputs, m.outputs) for m in matrices(model.config) if m.name == matrix
        )
        assert tensors[f"{key}.lora_A.weight"].shape == (3, inputs)
        assert tensors[f"{key}.lora_B.weight"].shape == (outputs, 3)
        assert (tensors[f"{key}.lora_A.weight"].T == np.asarray(lora.a[matrix][...])[1]).all()
    assert len(tensors) == 2 * 4 * 2
    assert (settings["r"], settings["lora_alpha"], settings["use_rslora"]) == (3, 5.0, False)
    assert set(settings["target_modules"]) >= {module.split(".")[-1] for module in modules}


@pytest.mark.parametrize(("name", "alignment"), [("llama", "right"), ("opt", "own")])
def test_pool_files(tmp_path, name, alignment):
    model = tiny_decoder(name)
    pool = random_adapter("pool", model)
    folder = save_adapter(pool, tmp_path / "pool", decoder=model)
    settings = json.loads((folder / "pool.json").read_text())
    assert settings["lengths"] == [3, 7] and settings["selector"] == "sum_attention"
    assert settings["alignment"] == alignment
    for prompt, part in zip(pool.prompts, settings["prompts"], strict=True):
        assert same(read_adapter(model, folder / part), prompt)


def test_a_selector_without_a_name_is_not_saved_as_another(tmp_path):
    model = tiny_decoder("llama")
    pool = Pool([random_prompt(model, 2)] * 2, lambda inputs: fixed_scores(inputs, index=1))
    with pytest.raises(ValueError, match=r"selector .* no name to save; put it into a file"):
        save_adapter(pool, tmp_path / "pool", decoder=model)
    assert not (tmp_path / "pool").exists()


def test_rank_stabilised_scale_is_read(tmp_path):
    model, folder, settings, _ = written(tmp_path, "lora")
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "use_rslora": True}))
    layers = load_adapter(model, folder).decoder.layers
    assert layers.q.scale == pytest.approx(5.0 / 3**0.5)


OTHER_MODELS = [
    ("prompt", {"hidden_dim": 32}, "another model: it has token_dim 64, this model needs 32"),
    ("prompt", {"num_layers": 3}, "another model: it has num_layers 2, this model needs 3"),
    ("prefix", {"num_layers": 3}, "another model: it has num_layers 2, .* 3"),
    ("prefix", {"num_kv_heads": 4}, "another model: it has num_attention_heads 2, .* 4"),
    # Rows of as many numbers: 2 layers of 2 heads, and 1 layer of 4 or heads twice as wide.
    ("prefix", {"num_layers": 1, "num_kv_heads": 4}, "another model: it has num_layers 2, .* 1"),
    (
        "prefix",
        {"num_kv_heads": 1, "num_heads": 2},
        "another model: it has num_attention_heads 2, .* 1",
    ),
    ("cartridge", {"num_layers": 3}, "another model: it has num_layers 2, .* 3"),
    ("deep", {"num_kv_heads": 4}, "another model: it has num_attention_heads 2, .* 4"),
    ("lora", {"num_layers": 3}, "another model: .*2 layers.*3 layers"),
    ("lora", {"num_layers": 1}, r"another model: .*layers\.1\..*no such module"),
    ("lora", {"hidden_dim": 32}, r"another model: .*up_proj of \(64, 96\).*\(32, 96\)"),
    ("lora", {"ffw_dim": 64}, r"another model: .*up_proj of \(64, 96\).*\(64, 64\)"),
    ("pool", {"hidden_dim": 32}, "another model: it has token_dim 64, this model needs 32"),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """One adapter of each kind, for the small LLaMA."""
    model, folder = tiny_decoder("llama"), tmp_path_factory.mktemp("adapters")
    for kind in KINDS:
        save_adapter(random_adapter(kind, model), folder / kind, decoder=model)
    return folder


@pytest.mark.parametrize(("kind", "other", "message"), OTHER_MODELS)
def test_adapters_of_another_model_are_refused(saved, kind, other, message):
    with pytest.raises(ValueError, match=message) as error:
        read_adapter(tiny_decoder("llama", **other), saved / kind)
    assert "\n" not in str(error.value)


def test_an_adapter_of_another_architecture_is_refused(saved):
    with pytest.raises(ValueError, match="another model"):
        read_adapter(tiny_decoder("opt"), saved / "lora")


def change(folder, file: str = "adapter_config.json", **settings):
    """Overwrites settings; None takes one out."""
    tree = json.loads((folder / file).read_text()) | settings
    tree = {key: value for key, value in tree.items() if value is not None}
    (folder / file).write_text(json.dumps(tree))


def truncate(folder):
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-40])


def drop(folder, *names):
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name: x for name, x in tensors.items() if not name.endswith(names)}, file)


DAMAGE = {
    "no-config": (
        "prompt",
        lambda f: (f / "adapter_config.json").unlink(),
        "adapter_config.json and no pool.json; give",
    ),
    "no-tensors": (
        "lora",
        lambda f: (f / "adapter_model.safetensors").unlink(),
        "adapter_model.safetensors is missing or damaged",
    ),
    "truncated": ("lora", truncate, "adapter_model.safetensors is missing or damaged"),
    "not-json": (
        "prompt",
        lambda f: (f / "adapter_config.json").write_text('{"peft_type": '),
        "adapter_config.json is not JSON",
    ),
    "unknown-type": (
        "prompt",
        lambda f: change(f, peft_type="IA3"),
        "'IA3' is not supported; supported: PROMPT_TUNING, PREFIX_TUNING, LORA",
    ),
    "no-type": ("prompt", lambda f: change(f, peft_type=None), "None is not supported"),
    "no-count": ("prompt", lambda f: change(f, num_virtual_tokens=None), "num_virtual_tokens"),
    "wrong-count": (
        "prompt",
        lambda f: change(f, num_virtual_tokens=6),
        r"prompt_embeddings of \(5, 64\) do not have the 6 rows that num_virtual_tokens says",
    ),
    "frozen-beyond-the-end": (
        "cartridge",
        lambda f: change(f, num_frozen_tokens=6),
        "num_frozen_tokens 6 is more than the 5 tokens",
    ),
    "lengths-of-other-layers": (
        "deep",
        lambda f: change(f, layer_lengths=[5, 1, 2]),
        r"layer_lengths \[5, 1, 2\] do not fit 2 layers of at most 5 tokens",
    ),
    "lengths-beyond-the-end": (
        "deep",
        lambda f: change(f, layer_lengths=[6, 1]),
        r"layer_lengths \[6, 1\] do not fit 2 layers of at most 5 tokens",
    ),
    "no-lengths": ("deep", lambda f: change(f, layer_lengths=None), "lacks layer_lengths"),
    "no-embeddings": ("prefix", lambda f: drop(f, "prompt_embeddings"), "prompt_embeddings"),
    "no-alpha": ("lora", lambda f: change(f, lora_alpha=None), "lora_alpha"),
    "half-a-lora": ("lora", lambda f: drop(f, "q_proj.lora_B.weight"), "q_proj.lora_B.weight"),
    "a-lora-elsewhere": (
        "lora",
        lambda f: drop(f, "0.self_attn.q_proj.lora_A.weight"),
        "lacks model.layers.0.self_attn.q_proj.lora_A.weight",
    ),
    "dora": ("lora", lambda f: change(f, use_dora=True), "use_dora = True is not supported"),
    "pool-without-a-prompt": (
        "pool",
        lambda f: change(f, "pool.json", prompts=["prompt_9"]),
        "prompt_9 holds no adapter_config.json",
    ),
    "pool-of-nothing": ("pool", lambda f: change(f, "pool.json", prompts=[]), "no prompts"),
    "pool-without-a-list": ("pool", lambda f: change(f, "pool.json", prompts=None), "prompts"),
    "pool-selector": (
        "pool",
        lambda f: change(f, "pool.json", selector="best"),
        "no selector 'best'; there are",
    ),
}


@pytest.mark.parametrize(("kind", "harm", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_adapters_are_refused(tmp_path, kind, harm, message):
    model = tiny_decoder("llama")
    folder = save_adapter(random_adapter(kind, model), tmp_path / "a", decoder=model)
    harm(folder)
    with pytest.raises(ValueError, match=message) as error:
        load_adapter(model, folder)
    assert "\n" not in str(error.value)


def test_a_pool_of_something_else_is_refused(tmp_path):
    model = tiny_decoder("llama")
    folder = save_adapter(random_adapter("pool", model), tmp_path / "a", decoder=model)
    save_adapter(random_adapter("prefix", model), folder / "prefix", decoder=model)
    own = json.loads((folder / "pool.json").read_text())["prompts"]
    change(folder, "pool.json", prompts=[own[0], "prefix"])
    with pytest.raises(ValueError, match="a pool holds prompts of one kind"):
        load_adapter(model, folder)


@pytest.mark.parametrize(
    ("name", "alignment", "message"),
    [
        ("opt", "right", "another model: .*prompts aligned 'right', this model needs 'own'"),
        ("llama", "centred", "another model: .*'centred', this model needs 'right'"),
        ("llama", "own", None),  # only distances count
        ("opt", None, None),  # a pool put together by hand from PEFT's prompts
    ],
)
def test_a_pool_of_another_alignment_is_refused(tmp_path, name, alignment, message):
    model = tiny_decoder(name)
    folder = save_adapter(random_adapter("pool", model), tmp_path / "a", decoder=model)
    change(folder, "pool.json", alignment=alignment)
    if message is None:
        assert same(read_adapter(model, folder), random_adapter("pool", model))
        return
    with pytest.raises(ValueError, match=message):
        load_adapter(model, folder)


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere holds no adapter_config\.json"):
        load_adapter(tiny_decoder("llama"), tmp_path / "nowhere")


# PEFT itself, on the same model.

# transformers warns PEFT of a name that it will lose.
deprecated = pytest.mark.filterwarnings(
    "ignore:`(is_gradient_checkpointing|past_key_values)` is deprecated:FutureWarning"
)
PARITY = {
    "llama": {},
    "opt": {},
    "opt-projected": {"embedding_dim": 32},
}


def peft_pair(tmp_path, name: str):
    """A tiny model here and in transformers, and ids without padding and with."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    model = tiny_decoder(name.split("-")[0], **PARITY[name])
    folder = write_folder(model, tmp_path / "model")
    hf_config(model.config).save_pretrained(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = np.random.default_rng(1).integers(3, 128, (2, 9))
    return peft, load_model(folder), theirs, ids


def their_logits(model, ids) -> np.ndarray:
    """The last T logits: PEFT also gives those of a soft prompt's tokens."""
    import torch

    with torch.no_grad():
        ids = torch.tensor(ids)
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return logits[:, -ids.shape[1] :].numpy()


@deprecated
@pytest.mark.parametrize("kind", ["prompt", "prefix", "cartridge", "lora"])
@pytest.mark.parametrize("name", PARITY)
def test_peft_reads_what_is_written(tmp_path, name, kind):
    peft, model, theirs, ids = peft_pair(tmp_path, name)
    adapter = random_adapter(kind, model)
    plain = their_logits(theirs, ids)
    folder = save_adapter(adapter, tmp_path / "adapter", decoder=model)
    expected = their_logits(peft.PeftModel.from_pretrained(theirs, folder).eval(), ids)
    found = np.asarray(load_adapter(model, folder)(ids))
    assert np.abs(found - expected).max() <= 2e-4
    assert np.abs(plain - expected).max() > 0.1


def peft_settings(peft, kind: str, name: str):
    """PEFT's own configuration of each kind."""
    shared = {"task_type": "CAUSAL_LM"}
    if kind == "prompt":
        width = {"token_dim": 32} if name == "opt-projected" else {}
        return peft.PromptTuningConfig(num_virtual_tokens=4, **width, **shared)
    if kind == "prefix":
        return peft.PrefixTuningConfig(num_virtual_tokens=4, **shared)
    if kind == "cartridge":
        return peft.CartridgeConfig(num_virtual_tokens=4, num_frozen_tokens=1, **shared)
    targets = ["v_proj", "fc2" if "opt" in name else "down_proj"]
    return peft.LoraConfig(r=3, lora_alpha=6, target_modules=targets, **shared)


@deprecated
@pytest.mark.parametrize("kind", ["prompt", "prefix", "cartridge", "lora"])
@pytest.mark.parametrize("name", PARITY)
def test_what_peft_writes_is_read(tmp_path, name, kind):
    peft, model, theirs, ids = peft_pair(tmp_path, name)
    import torch

    plain = their_logits(theirs, ids)
    torch.manual_seed(0)
    tuned = peft.get_peft_model(theirs, peft_settings(peft, kind, name)).eval()
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape) * 0.3)
    expected = their_logits(tuned, ids)
    tuned.save_pretrained(tmp_path / "theirs")
    found = np.asarray(load_adapter(model, tmp_path / "theirs")(ids))
    assert np.abs(found - expected).max() <= 2e-4
    assert np.abs(plain - expected).max() > 0.1
    adapter = read_adapter(model, tmp_path / "theirs")
    assert isinstance(adapter, LoraAdapter) == (kind == "lora")
    assert getattr(adapter, "frozen", 0) == (1 if kind == "cartridge" else 0)
