"""Settings that differ between matrices: which rule counts for which matrix.

A rule is one line, "REGEX SETTING=VALUE ..." or "REGEX skip"; the regex is searched for in the
matrix' module name in the checkpoint ("model.layers.0.mlp.down_proj"). The invariant: every rule
matches something, and of several that match a matrix the first counts.
"""

import re
from typing import Any

from idp_jax.config import Compression, ConfigError
from idp_jax.config.files import from_dict

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
    plain = Compression(**common)
    rules = [(rule, *_read(rule, common)) for rule in settings.rules]
    used, found = set(), {}
    for name in names:
        matching = (entry for entry in rules if entry[1].search(name))
        rule, _, changed = next(matching, ("", None, plain))
        used.add(rule)
        found[name] = changed
    for rule, pattern, _ in rules:
        if rule not in used:
            earlier = any(pattern.search(name) for name in names)
            reason = "every matrix it matches has an earlier rule" if earlier else "no such matrix"
            raise ConfigError(f"--rules {rule!r}: {reason}; names are like {names[0]}")
    for pattern in settings.allow_worse:
        if not any(_regex(pattern, "--allow-worse").search(name) for name in names):
            raise ConfigError(
                f"--allow-worse {pattern!r}: no such matrix; names are like {names[0]}"
            )
    return found


def allowed_worse(settings: Compression, name: str) -> bool:
    """Whether a matrix may end worse than its baseline."""
    return any(re.search(pattern, name) for pattern in settings.allow_worse)


def _read(rule: str, common: dict[str, Any]) -> tuple[re.Pattern[str], Compression | None]:
    pattern, *changes = rule.split() or [""]
    regex = _regex(pattern, "--rules")
    if changes == ["skip"]:
        return regex, None
    texts = {key: value for key, _, value in (change.partition("=") for change in changes)}
    if not texts or set(texts) - set(SETTINGS) or "" in texts.values():
        raise ConfigError(
            f'--rules {rule!r} is not "REGEX SETTING=VALUE ..." or "REGEX skip"; '
            f"settings: {', '.join(SETTINGS)}"
        )
    # A choice of numbers is not found by its text; the other settings are read from theirs.
    values = {k: int(v) if k == "bits" and v.isdecimal() else v for k, v in texts.items()}
    return regex, from_dict(Compression, {**common, **values}, f"--rules {rule!r}")


def _regex(pattern: str, option: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"{option} {pattern!r} is no regular expression: {error}") from None
