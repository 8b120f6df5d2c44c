"""Settings matrix by matrix: the first rule that matches counts, and none is without effect."""

import dataclasses

import pytest

from idp_jax.compression.rules import SETTINGS, allowed_worse, settings_by_name
from idp_jax.config import Compression, ConfigError

NAMES = [
    f"model.layers.{layer}.{module}"
    for layer in (0, 1)
    for module in ("attn.q", "mlp.up", "mlp.down")
]


def found(*rules: str, **settings) -> dict[str, Compression | None]:
    return settings_by_name(Compression(**settings, rules=rules), NAMES)


def test_without_rules_all_are_alike():
    by_name = found(bits=4, allow_worse=("attn",))
    assert list(by_name) == NAMES
    assert set(by_name.values()) == {Compression(bits=4)}


def test_the_first_rule_that_matches_counts():
    by_name = found(
        r"layers\.0\..*down bits=8 group_size=-1",
        "down skip",
        "q method=rtn symmetric=true grid=minmax",
        r"^model\.layers\.1\. sparsity=2:4 damping=0.1 block_size=64 act_order=none",
        bits=4,
    )
    assert by_name["model.layers.0.mlp.down"] == Compression(bits=8, group_size=-1)
    assert by_name["model.layers.1.mlp.down"] is None
    q = Compression(bits=4, method="rtn", symmetric=True, grid="minmax")
    assert by_name["model.layers.0.attn.q"] == by_name["model.layers.1.attn.q"] == q
    assert by_name["model.layers.0.mlp.up"] == Compression(bits=4)
    up = by_name["model.layers.1.mlp.up"]
    assert up == Compression(bits=4, sparsity="2:4", damping=0.1, block_size=64, act_order="none")
    assert up.target() == {"pattern": (2, 4)}


def test_every_setting_of_a_matrix_may_differ():
    """All but those of the run: its rules and what is allowed."""
    fields = {field.name for field in dataclasses.fields(Compression)}
    assert set(SETTINGS) == fields - {"rules", "allow_worse"}


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (("gate bits=4",), "--rules 'gate bits=4': no such matrix; names are like model.layers.0"),
        (("down bits=4", "mlp.down skip"), "every matrix it matches has an earlier rule"),
        (("down bit=4",), "'down bit=4' is not \"REGEX SETTING=VALUE .* settings: method, bits"),
        (("down rules=x",), 'is not "REGEX SETTING=VALUE'),
        (("down bits=",), 'is not "REGEX SETTING=VALUE'),
        (("down",), 'is not "REGEX SETTING=VALUE'),
        (("",), 'is not "REGEX SETTING=VALUE'),
        (("down skip bits=4",), 'is not "REGEX SETTING=VALUE'),
        (("(down bits=4",), r"--rules '\(down' is no regular expression: "),
        (("down bits=5",), "--rules 'down bits=5': .*--bits 5 is not one of 2, 3, 4, 8"),
        (("down bits=four",), "--rules 'down bits=four': --bits 'four' is not one of 2, 3, 4, 8"),
        (("down sparsity=4:2",), "--sparsity '4:2' is neither"),
        (("down act_order=on",), "--act-order 'on' is not one of"),
    ],
)
def test_rules_that_cannot_be_used(rules, message):
    with pytest.raises(ConfigError, match=message) as error:
        found(*rules)
    assert "\n" not in str(error.value)


def test_what_may_end_worse():
    settings = Compression(allow_worse=("q$", r"layers\.1\..*up"))
    settings_by_name(settings, NAMES)
    allowed = [name for name in NAMES if allowed_worse(settings, name)]
    assert allowed == [NAMES[0], NAMES[3], NAMES[4]]
    with pytest.raises(ConfigError, match="--allow-worse 'gate': no such matrix; names are like"):
        settings_by_name(Compression(allow_worse=("q", "gate")), NAMES)
    with pytest.raises(ConfigError, match=r"--allow-worse '\*' is no regular expression"):
        settings_by_name(Compression(allow_worse=("*",)), NAMES)
