"""No key, type or tensor of an adapter's folder passes without a meaning: done, or one line."""

import dataclasses
import json
import re

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from idp_jax import load_adapter
from idp_jax.formats import save_adapter
from idp_jax.formats.adapters import read_adapter
from idp_jax.formats.peft_keys import NEUTRAL, READ, REFUSED
from tests.formats.test_peft import KINDS, change, deprecated, random_adapter, same
from tests.helpers import tiny_decoder

MODEL = tiny_decoder("llama")


@pytest.fixture
def saved(tmp_path):
    """kind -> a fresh folder of that kind of adapter."""
    return lambda kind, model=MODEL: save_adapter(
        random_adapter(kind, model), tmp_path / kind, decoder=model
    )


def refusal(folder, model=MODEL) -> str:
    """The one line that refuses a folder."""
    with pytest.raises(ValueError) as error:
        load_adapter(model, folder)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("kind", [kind for kind in READ if not kind.startswith("IDP_")])
def test_every_key_of_peft_has_its_place(kind):
    peft = pytest.importorskip("peft")
    config = {
        "LORA": peft.LoraConfig,
        "MASKED_LORA": peft.LoraConfig,
        "LN_TUNING": peft.LNTuningConfig,
        "PROMPT_TUNING": peft.PromptTuningConfig,
        "PREFIX_TUNING": peft.PrefixTuningConfig,
        "CARTRIDGE": peft.CartridgeConfig,
    }[kind]
    known = {*READ[kind], *NEUTRAL[kind], *REFUSED}
    assert {field.name for field in dataclasses.fields(config)} <= known
    assert not READ[kind].keys() & NEUTRAL[kind]


UNSUPPORTED = [
    ("lora", "init_lora_weights", "pissa_niter_16"),
    ("lora", "init_lora_weights", "olora"),
    ("lora", "init_lora_weights", "corda"),
    ("lora", "init_lora_weights", "loftq"),
    ("lora", "init_lora_weights", "lora_ga"),
    ("lora", "init_lora_weights", "a later one"),
    ("lora", "use_dora", True),
    ("lora", "use_qalora", True),
    ("lora", "target_parameters", ["mlp.experts.up_proj"]),
    ("lora", "layer_replication", [[0, 1], [0, 1]]),
    ("lora", "arrow_config", {"top_k": 2}),
    ("lora", "kasa_config", {"beta": 1e-4}),
    ("lora", "monteclora_config", {"num_samples": 4}),
    ("lora", "velora_config", {"num_groups": 64}),
    ("lora", "use_bdlora", {"nblocks": 2}),
    ("lora", "task_type", "SEQ_CLS"),
    ("lora", "a_key_of_tomorrow", 1),
    ("prompt", "modules_to_save", ["lm_head"]),
    ("prompt", "num_transformer_submodules", 2),
    ("prompt", "task_type", "SEQ_2_SEQ_LM"),
    ("prefix", "num_transformer_submodules", 2),
    ("prefix", "a_key_of_tomorrow", "x"),
    # Wrong types.
    ("lora", "r", 0),
    ("lora", "r", -2),
    ("lora", "r", "8"),
    ("lora", "r", True),
    ("lora", "r", 3.0),
    ("lora", "lora_alpha", "16"),
    ("lora", "lora_alpha", float("nan")),
    ("lora", "lora_alpha", 10**400),
    ("lora", "use_rslora", "no"),
    ("lora", "use_rslora", 0),
    ("lora", "bias", "some"),
    ("lora", "bias", {}),
    ("lora", "target_modules", 5),
    ("lora", "target_modules", "(q_proj"),
    ("lora", "target_modules", ["q_proj", None]),
    ("lora", "modules_to_save", "lm_head"),
    ("lora", "modules_to_save", ["*head"]),
    ("lora", "rank_pattern", {"q_proj": 0}),
    ("lora", "rank_pattern", ["q_proj"]),
    ("lora", "alpha_pattern", {"[": 2}),
    ("lora", "layers_to_transform", "0"),
    ("lora", "layers_to_transform", [-1]),
    ("lora", "layers_pattern", "layers"),  # without layers_to_transform
    ("lora", "trainable_token_indices", {"norm": [3]}),
    ("lora", "trainable_token_indices", [True]),
    ("prompt", "num_virtual_tokens", "5"),
    ("prompt", "num_virtual_tokens", -5),
    ("prompt", "token_dim", [64]),
    ("prefix", "num_layers", 2.0),
    ("prefix", "num_attention_heads", {}),
    ("cartridge", "num_frozen_tokens", -1),
    ("cartridge", "num_frozen_tokens", True),
    ("cartridge", "layer_lengths", [1, 2]),
    ("cartridge", "prefix_projection", True),
    ("deep", "layer_lengths", [2, -1]),
    ("deep", "layer_lengths", [True, 5]),
    ("deep", "layer_lengths", "5 5"),
    ("deep", "a_key_of_tomorrow", 1),
]


@pytest.mark.parametrize(
    ("kind", "key", "value"), UNSUPPORTED, ids=[f"{k}-{n}-{v!r:.30}" for k, n, v in UNSUPPORTED]
)
def test_what_cannot_be_done_is_refused_by_name(saved, kind, key, value):
    folder = saved(kind)
    change(folder, **{key: value})
    said = refusal(folder)
    assert str(folder / "adapter_config.json") in said and key in said
    assert "another model" not in said


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("lora", {"lora_dropout": 0.1, "megatron_core": "x", "eva_config": {"rho": 2.0}}),
        ("lora", {"use_dora": False, "a_key_of_tomorrow": None, "another": [], "third": {}}),
        ("lora", {"runtime_config": {"ephemeral_gpu_offload": True}, "peft_version": "0.99"}),
        ("lora", {"auto_mapping": {"base_model_class": "LlamaForCausalLM"}}),
        ("prompt", {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "hello"}),
        ("prompt", {"task_type": None, "num_layers": None, "token_dim": None}),
        ("prefix", {"encoder_hidden_size": 7, "init_weights": "zero", "inference_mode": False}),
    ],
)
def test_keys_of_training_change_nothing(saved, kind, settings):
    folder = saved(kind)
    change(folder, **settings)
    tree = json.loads((folder / "adapter_config.json").read_text())
    empty = {key: value for key, value in settings.items() if value is None}
    (folder / "adapter_config.json").write_text(json.dumps({**tree, **empty}))
    assert same(read_adapter(MODEL, folder), random_adapter(kind, MODEL))


CONTRADICTIONS = [
    ({"r": 4}, "do not have the rank 4 that r or rank_pattern says"),
    ({"rank_pattern": {"o_proj": 2}}, "o_proj.lora_A.weight of .* do not have the rank 2"),
    ({"target_modules": ["q_proj"]}, "the file updates .*, which target_modules .* leave out"),
    ({"target_modules": ["gate_proj", "x"]}, "the file updates"),
    ({"target_modules": ["c_attn"]}, "names no module of this model"),
    ({"exclude_modules": ["v_proj"]}, "the file updates .*v_proj"),
    ({"layers_to_transform": [1]}, r"the file updates .*layers\.0"),
    ({"lora_bias": True}, "lacks .*lora_B.bias"),
    ({"modules_to_save": ["lm_head"]}, "replaces lm_head.weight, which the file lacks"),
    ({"trainable_token_indices": [4]}, "trainable_token_indices and the tensor .* do not go"),
    (
        {"target_modules": ["q_proj", "v_proj", "o_proj", "up_proj", "k_proj"]},
        "the settings update .*k_proj, of which the file holds nothing",
    ),
]


@pytest.mark.parametrize(("settings", "message"), CONTRADICTIONS)
def test_settings_that_contradict_the_file_are_refused(saved, settings, message):
    folder = saved("lora")
    change(folder, **settings)
    said = refusal(folder)
    assert re.search(message, said) and "another model" not in said


def edit_tensors(folder, edit, file: str = "adapter_model.safetensors"):
    """Writes the tensors again as `edit` leaves them."""
    tensors = load_file(folder / file)
    edit(tensors)
    save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, folder / file)


Q = "base_model.model.model.layers.0.self_attn.q_proj"
TENSORS = {
    "b-of-another-rank": (
        lambda t: t.update({f"{Q}.lora_B.weight": t[f"{Q}.lora_B.weight"][:, :2]}),
        "q_proj.lora_A.weight of (3, 64) and lora_B.weight of (64, 2)",
    ),
    "a-without-axes": (
        lambda t: t.update({f"{Q}.lora_A.weight": np.ones(3, "f4")}),
        "q_proj.lora_A.weight of (3,)",
    ),
    "dora": (
        lambda t: t.update({f"{Q}.lora_magnitude_vector": np.ones(64, "f4")}),
        "q_proj.lora_magnitude_vector is not known",
    ),
    "bias-of-old-peft": (
        lambda t: t.update({f"{Q}.bias": np.ones(64, "f4")}),
        "q_proj.bias is not known",
    ),
    "whole-numbers": (
        lambda t: t.update({f"{Q}.lora_A.weight": np.ones((3, 64), "i4")}),
        "q_proj.lora_A.weight in",
    ),
    "a-resized-vocabulary": (
        lambda t: t.update({"base_model.model.lm_head.weight": np.ones((130, 64), "f4")}),
        "lm_head.weight of (130, 64), this model needs (128, 64)",
    ),
    "without-prefix": (lambda t: t.update(other=np.ones(1, "f4")), "the tensor other"),
    "nothing": (lambda t: t.clear(), "holds no update"),
}


@pytest.mark.parametrize(("edit", "message"), TENSORS.values(), ids=TENSORS)
def test_tensors_without_a_place_are_refused(saved, edit, message):
    folder = saved("lora")
    edit_tensors(folder, edit)
    assert message in refusal(folder)


@pytest.mark.parametrize("kind", ["prompt", "prefix", "lora"])
@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_named(saved, kind, number):
    folder = saved(kind)

    def spoil(tensors):
        name = sorted(tensors)[-1]
        tensors[name] = tensors[name].copy()
        tensors[name].flat[[1, 4]] = number
        spoiled.append(name)

    spoiled = []
    edit_tensors(folder, spoil)
    said = refusal(folder)
    assert spoiled[0] in said and "2 numbers of" in said and "not finite" in said


DAMAGED_JSON = {
    "cut": b'{"peft_type": "LORA", "r": 3',
    "list": b"[]",
    "bytes": b'{"peft_type": "\xff\xfe"}',
    "deep": b"[" * 100_000,
    "empty": b"",
    "long-number": b'{"peft_type": "LORA", "r": ' + b"9" * 5000 + b"}",
    "type-of-a-type": b'{"peft_type": ["LORA"]}',
}


@pytest.mark.parametrize("content", DAMAGED_JSON.values(), ids=DAMAGED_JSON)
def test_damaged_settings_are_one_line(saved, content):
    folder = saved("lora")
    (folder / "adapter_config.json").write_bytes(content)
    assert "adapter_config.json" in refusal(folder)


POOLS = [
    ("prompts", ["../elsewhere"], "a list of folders below"),
    ("prompts", ["/etc"], "a list of folders below"),
    ("prompts", ["prompt_0_3_tokens/../../pool2"], "a list of folders below"),
    ("prompts", "prompt_0_3_tokens", "a list of folders below"),
    ("prompts", [3], "a list of folders below"),
    ("prompts", {"a": 1}, "a list of folders below"),
    ("selector", 5, "a name"),
    ("selector", ["sum_attention"], "a name"),
    ("alignment", 1, "a name"),
    ("type", "POOL", "IDP_POOL"),
    ("lengths", [3, 8], "are not those of the prompts, [3, 7]"),
    ("lengths", "3, 7", "a list of numbers"),
    ("temperature", 0.5, "not known"),
]


@pytest.mark.parametrize(("key", "value", "message"), POOLS)
def test_settings_of_a_pool_are_checked(saved, key, value, message):
    folder = saved("pool")
    change(folder, "pool.json", **{key: value})
    said = refusal(folder)
    assert str(folder / "pool.json") in said and key in said and message in said


def test_a_link_out_of_a_pool_is_refused(saved, tmp_path):
    folder, other = saved("pool"), saved("prompt")
    (folder / "inside").symlink_to(other)
    change(folder, "pool.json", prompts=["inside"], lengths=None)
    assert "'inside' lies outside" in refusal(folder)


@pytest.mark.parametrize("kind", ["prompt", "prefix", "lora"])
def test_a_pickle_is_read_as_safetensors_are(saved, kind):
    torch = pytest.importorskip("torch")
    folder = saved(kind)
    tensors = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    tensors = {name: torch.tensor(value) for name, value in tensors.items()}
    torch.save(tensors, folder / "adapter_model.bin")
    assert same(read_adapter(MODEL, folder), random_adapter(kind, MODEL))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut", {"w": [1]}, {"w": print}, [1]])
def test_a_pickle_of_something_else_is_refused(saved, content):
    torch = pytest.importorskip("torch")
    folder = saved("lora")
    (folder / "adapter_model.safetensors").unlink()
    if isinstance(content, bytes):
        (folder / "adapter_model.bin").write_bytes(content)
    else:
        torch.save(content, folder / "adapter_model.bin")
    assert "adapter_model.bin is damaged or holds more than tensors" in refusal(folder)


@pytest.mark.parametrize("kind", ["adapter_model.bin", "adapter_model.safetensors"])
@pytest.mark.parametrize("name", ["int32", "float8_e4m3fn"])
def test_tensors_of_another_type_are_no_adapter(saved, kind, name):
    torch = pytest.importorskip("torch")
    safetensors = pytest.importorskip("safetensors.torch")
    folder = saved("lora")
    exact = safetensors.load_file(folder / "adapter_model.safetensors")
    tensors = {key: value.to(getattr(torch, name)) for key, value in exact.items()}
    if kind.endswith("bin"):
        (folder / "adapter_model.safetensors").unlink()
        torch.save(tensors, folder / kind)
    else:
        safetensors.save_file(tensors, folder / kind)
    if name == "int32":
        assert "holds int32 and no floating-point numbers" in refusal(folder)
    elif kind.endswith("bin"):
        read_adapter(MODEL, folder)  # torch knows the type
    else:
        assert "holds numbers of a type that is not read here" in refusal(folder)


def test_half_precision_is_read(saved):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file as load
    from safetensors.torch import save_file as save

    folder = saved("lora")
    file = folder / "adapter_model.safetensors"
    exact = {name: value.bfloat16() for name, value in load(file).items()}
    save({name: value.float() for name, value in exact.items()}, file)
    expected = read_adapter(MODEL, folder)
    save(exact, file)
    assert same(read_adapter(MODEL, folder), expected)
    torch.save(exact, folder / "adapter_model.bin")
    file.unlink()
    assert same(read_adapter(MODEL, folder), expected)


@deprecated
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_projected_prefix_is_what_its_projection_gave(tmp_path):
    peft = pytest.importorskip("peft")
    import torch

    from tests.formats.test_peft_lora import IDS, peft_logits, theirs
    from tests.helpers import hf_config, write_folder

    base = write_folder(MODEL, tmp_path / "base")
    hf_config(MODEL.config).save_pretrained(base)
    settings = {"num_virtual_tokens": 4, "prefix_projection": True, "encoder_hidden_size": 12}
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", **settings)
    torch.manual_seed(0)
    peft.get_peft_model(theirs(base), config).save_pretrained(tmp_path / "prefix")
    expected = peft_logits(base, tmp_path / "prefix")
    found = np.asarray(load_adapter(MODEL, tmp_path / "prefix")(IDS))
    assert np.abs(found - expected).max() <= 2e-4
    assert np.abs(np.asarray(MODEL(IDS)) - expected).max() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_another_kind_of_file_in_place_of_tensors_is_refused(saved, kind):
    folder = saved(kind)
    for file in folder.rglob("adapter_model.safetensors"):
        file.unlink()
        file.mkdir()
    assert "adapter_model.safetensors is missing or damaged" in refusal(folder)
