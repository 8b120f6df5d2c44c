"""Settings that differ between matrices: which rule counts for which matrix.

A rule is one line, "REGEX SETTING=VALUE ..." or "REGEX skip"; the regex is searched for in the
matrix' module name in the checkpoint ("model.layers.0.mlp.down_proj"). The invariant: every rule
matches something, and of several that match a matrix the first counts.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from idp_jax.config.groups import ConfigError


class Rule(NamedTuple):
    """A rule as it was read.

    Attributes:
        label: the option and the rule, for messages.
        pattern: what is searched for in a matrix' name.
        changes: settings by name, as texts; None where the matrix is left out.
    """

    label: str
    pattern: re.Pattern[str]
    changes: dict[str, str] | None


def rules_by_name(
    rules: Sequence[str], names: Sequence[str], option: str, settings: Sequence[str]
) -> dict[str, Rule | None]:
    """The rule that counts for every matrix.

    Args:
        names: of all matrices' modules, as in the checkpoint.
        option: what the rules were given by, for messages.
        settings: what a rule may change.

    Returns:
        name -> its rule, or None where none matches.

    Raises:
        ConfigError: a rule that cannot be read, or that is the first to match no matrix at all.
    """
    read = [_read(rule, option, settings) for rule in rules]
    found = {name: next((r for r in read if r.pattern.search(name)), None) for name in names}
    used = {rule.label for rule in found.values() if rule is not None}
    for rule in read:
        if rule.label not in used:
            earlier = any(rule.pattern.search(name) for name in names)
            reason = "every matrix it matches has an earlier rule" if earlier else "no such matrix"
            raise ConfigError(f"{rule.label}: {reason}; names are like {names[0]}")
    return found


def regex(pattern: str, option: str) -> re.Pattern[str]:
    """A regular expression, or a ConfigError that names the option."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"{option} {pattern!r} is no regular expression: {error}") from None


def _read(rule: str, option: str, settings: Sequence[str]) -> Rule:
    pattern, *changes = rule.split() or [""]
    label, found = f"{option} {rule!r}", regex(pattern, option)
    if changes == ["skip"]:
        return Rule(label, found, None)
    texts = {key: value for key, _, value in (change.partition("=") for change in changes)}
    if not texts or set(texts) - set(settings) or "" in texts.values():
        raise ConfigError(
            f'{label} is not "REGEX SETTING=VALUE ..." or "REGEX skip"; '
            f"settings: {', '.join(settings)}"
        )
    return Rule(label, found, texts)
