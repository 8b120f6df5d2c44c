"""The settings of every matrix: those of the run, but for what a rule changes.

The grammar of rules is that of `config.rules`.
"""

import re

from idp_jax.config import Compression, ConfigError
from idp_jax.config.files import from_dict
from idp_jax.config.rules import Rule, regex, rules_by_name

# What may differ from matrix to matrix; the rest belongs to the run.
SETTINGS = (
    "method",
    "bits",
    "group_size",
    "symmetric",
    "grid",
    "act_order",
    "sparsity",
    "damping",
    "block_size",
)


def settings_by_name(settings: Compression, names: list[str]) -> dict[str, Compression | None]:
    """The settings of every matrix.

    Args:
        settings: those of the run, with its rules.
        names: of all matrices' modules, as in the checkpoint.

    Returns:
        name -> settings, or None where the matrix is left as it is.

    Raises:
        ConfigError: a rule that cannot be read, or that is the first to match no matrix at all.
    """
    common = {key: getattr(settings, key) for key in SETTINGS}
    rules = rules_by_name(settings.rules, names, "--rules", SETTINGS)
    kinds: dict[str, Compression | None] = {"": Compression(**common)}
    for rule in rules.values():
        if rule is not None and rule.label not in kinds:
            kinds[rule.label] = _changed(rule, common)
    for pattern in settings.allow_worse:
        if not any(regex(pattern, "--allow-worse").search(name) for name in names):
            raise ConfigError(
                f"--allow-worse {pattern!r}: no such matrix; names are like {names[0]}"
            )
    return {name: kinds["" if rule is None else rule.label] for name, rule in rules.items()}


def allowed_worse(settings: Compression, name: str) -> bool:
    """Whether a matrix may end worse than its baseline."""
    return any(re.search(pattern, name) for pattern in settings.allow_worse)


def _changed(rule: Rule, common: dict) -> Compression | None:
    if rule.changes is None:
        return None
    # A choice of numbers is not found by its text; the other settings are read from theirs.
    values = {
        key: int(text) if key == "bits" and text.isdecimal() else text
        for key, text in rule.changes.items()
    }
    return from_dict(Compression, {**common, **values}, rule.label)
