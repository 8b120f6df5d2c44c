"""What `quantization_config` says of every matrix, in both languages."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from idp_jax.formats.quantization import (
    BITS,
    PACKED_FORMS,
    Packing,
    read_config,
    write_config,
)

NAMES = [f"model.layers.{n}.{m}" for n in (1, 2, 11) for m in ("mlp.up_proj", "self_attn.q_proj")]
packings = st.builds(
    Packing,
    bits=st.sampled_from(BITS),
    group_size=st.sampled_from([-1, 32, 128]),
    symmetric=st.booleans(),
    act_order=st.booleans(),
)
CT = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "symmetric": True, "strategy": "channel", "type": "int"},
        }
    },
}
SPARSE = {"sparsity_config": {"format": "sparse-bitmask"}}


@given(
    st.sampled_from(PACKED_FORMS),
    st.lists(st.none() | packings, min_size=len(NAMES), max_size=len(NAMES)),
)
def test_what_is_written_is_read(form, chosen):
    wanted = dict(zip(NAMES, chosen, strict=True))
    layout = read_config(write_config(form, wanted))
    if not any(chosen):
        assert layout is None
        return
    assert layout is not None and layout.form == form
    assert {name: layout.packing(name) for name in NAMES} == wanted


def test_the_commonest_packing_is_the_default():
    common, rare = Packing(4, 128, True), Packing(8, -1, True)
    wanted = {NAMES[0]: rare, NAMES[1]: common, NAMES[2]: common, NAMES[3]: None}
    gptq = write_config("gptq", wanted, damping=0.02)
    assert gptq is not None and (gptq["bits"], gptq["damp_percent"]) == (4, 0.02)
    assert list(gptq["dynamic"]) == [
        r"+:^model\.layers\.1\.mlp\.up_proj$",
        r"-:^model\.layers\.2\.self_attn\.q_proj$",
    ]
    theirs = write_config("pack-quantized", wanted)
    assert theirs is not None and theirs["ignore"] == [NAMES[3], "lm_head"]
    targets = [group["targets"] for group in theirs["config_groups"].values()]
    assert targets == [["Linear"], [NAMES[0]]]


def test_the_first_pattern_decides():
    layout = read_config(
        {
            "bits": 4,
            "group_size": 128,
            "dynamic": {
                "-:.*layers\\.1\\.": {},
                "+:.*q_proj": {"bits": 8, "group_size": 32},
                ".*": {"bits": 2},
            },
        }
    )
    assert layout is not None and layout.form == "gptq"
    assert layout.packing("model.layers.1.self_attn.q_proj") is None
    assert layout.packing("model.layers.11.self_attn.q_proj") == Packing(8, 32, True)
    assert layout.packing("model.layers.2.mlp.up_proj") == Packing(2, 128, True)


def test_a_name_goes_before_a_pattern_and_a_pattern_before_the_class():
    def group(targets, bits):
        return {"targets": targets, "weights": {"num_bits": bits, "group_size": 64}}

    groups = {
        "group_0": group(["Linear"], 2),
        "group_1": group(["re:.*up_proj$"], 3),
        "group_2": group([NAMES[0]], 8),
    }
    layout = read_config(CT | {"config_groups": groups, "ignore": ["re:.*layers.2"]})
    assert layout is not None
    bits = {name: layout.packing(name) for name in NAMES}
    assert [packing and packing.bits for packing in bits.values()] == [8, 2, None, None, 3, 2]


@pytest.mark.parametrize("form", ["sparse-bitmask", "sparse-24-bitmask"])
def test_sparse(form):
    written = write_config(form, dict.fromkeys(["model.decoder.layers.0.fc1"]))
    layout = read_config(written)
    assert layout is not None and layout.form == form and layout.packing("fc1") is None
    assert (
        written is not None and "model.decoder.project_in" in written["sparsity_config"]["ignore"]
    )


def test_what_says_nothing_of_packing():
    assert read_config(None) is None and write_config("dense", {NAMES[0]: None}) is None
    assert read_config({"quant_method": "compressed-tensors"}) is None


def changed(**changes) -> dict:
    """`CT` with another group."""
    group = CT["config_groups"]["group_0"]
    weights = group["weights"] | changes.pop("weights", {})
    return CT | {"config_groups": {"group_0": group | {"weights": weights} | changes}}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"quant_method": "awq"}, ["'awq'", "gptq, compressed-tensors"]),
        ({"bits": 5}, ["5-bit GPTQ"]),
        ({"bits": 4, "is_marlin_format": True}, ["Marlin"]),
        ({"bits": 4, "dynamic": {"+:(": {}}}, ["'('", "regular expression"]),
        (CT | {"format": "float-quantized"}, ["'float-quantized'", "pack-quantized"]),
        (CT | {"kv_cache_scheme": {"num_bits": 8}}, ["kv_cache_scheme"]),
        (CT | SPARSE, ["'sparse-bitmask'", "only packed"]),
        ({"sparsity_config": {"format": "marlin-24"}}, ["'marlin-24'", "sparse-bitmask"]),
        (changed(weights={"num_bits": 6}), ["6-bit pack-quantized"]),
        (changed(weights={"type": "float"}), ["'float'", "int by group or channel"]),
        (changed(weights={"strategy": "tensor"}), ["'tensor'", "int by group or channel"]),
        (changed(input_activations={"num_bits": 8}), ["group_0", "activations"]),
        (CT | {"config_groups": {"W4A16": ["Linear"]}}, ["W4A16", "weights"]),
    ],
)
def test_settings_that_are_not_supported(settings, words):
    with pytest.raises(ValueError) as caught:
        read_config(settings)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_an_unknown_form_is_not_written():
    with pytest.raises(ValueError, match="'gguf' is not supported; supported: gptq, gptq_v2"):
        write_config("gguf", {})
