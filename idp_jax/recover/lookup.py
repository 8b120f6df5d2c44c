"""Functions and classes by name: a built-in one's, `package.module:name`, or `path/file.py:name`.

Options may follow in brackets, as in `fixed(index=2)` or `mine.py:score(power=0.5)`. A name that
points at code runs that code when it is looked up.
"""

import ast
import functools
import importlib
import importlib.util
import operator
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

_WITH_OPTIONS = re.compile(r"(.+?)\((\w+\s*=.*)\)", re.DOTALL)


class Found(NamedTuple):
    """What a name stands for.

    Attributes:
        target: the function or class.
        options: its keyword arguments, plain values.
        name: the name with a file's path made absolute, so that it holds from any folder.
    """

    target: Callable
    options: dict[str, Any]
    name: str


def lookup(reference: str, known: Mapping[str, Callable], kind: str) -> Found:
    """Finds a function or class by its name.

    Args:
        known: the built-in ones.
        kind: what they are, for messages.

    Raises:
        ValueError: there is none of this name, it is not callable, or its code or its options
            cannot be read.
    """
    matched = _WITH_OPTIONS.fullmatch(reference)
    path, text = matched.groups() if matched else (reference, "")
    options = _options(text, reference, kind)
    place, colon, attribute = path.rpartition(":")
    if not colon:
        if path not in known:
            raise ValueError(
                f"no {kind} {path!r}; there are {', '.join(known)}, and package.module:name or "
                "file.py:name for one of your own"
            )
        return Found(known[path], options, reference)
    module = _from_file(Path(place), kind) if place.endswith(".py") else _imported(place, kind)
    try:
        target = operator.attrgetter(attribute)(module)
    except AttributeError as error:
        raise ValueError(f"{place} has no {kind} {attribute!r}; check the name") from error
    if not callable(target):
        raise ValueError(f"{attribute} of {place} cannot be called; a {kind} must be")
    full = f"{Path(place).resolve()}{reference[len(place) :]}"
    return Found(target, options, full if place.endswith(".py") else reference)


def reference_to(target: Callable) -> str | None:
    """The name by which `lookup` finds a function or class again, or None where there is none."""
    module, name = sys.modules.get(target.__module__), target.__qualname__
    if module is None or "<" in name:  # <lambda>, <locals>
        return None
    if target.__module__ != "__main__" and not _is_from_file(module):
        return f"{target.__module__}:{name}"
    file = getattr(module, "__file__", None)  # a notebook has none
    return None if file is None else f"{Path(file).resolve()}:{name}"


def _options(text: str, reference: str, kind: str) -> dict[str, Any]:
    try:
        call = ast.parse(f"_({text})", mode="eval").body
        assert isinstance(call, ast.Call) and not call.args
        options = {word.arg: ast.literal_eval(word.value) for word in call.keywords if word.arg}
        hash(tuple(options.values()))
        assert len(options) == len(call.keywords)
    except (SyntaxError, ValueError, TypeError, AssertionError) as error:
        raise ValueError(
            f"cannot read the options of {kind} {reference!r}; give them as in "
            "name(option=1, other='text')"
        ) from error
    return options


def _imported(name: str, kind: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:  # whatever a module of the user's raises
        raise ValueError(
            f"module {name} of a {kind} cannot be imported ({_one_line(error)}); for a file give "
            "its path, such as mine.py:name"
        ) from error


def _from_file(path: Path, kind: str) -> ModuleType:
    if not path.is_file():
        raise ValueError(f"there is no file {path} with a {kind}; check the path")
    path = path.resolve()
    main = sys.modules["__main__"]
    if Path(getattr(main, "__file__", None) or "").resolve() == path:
        return main  # a script that names its own function must not be run again
    try:
        return _module_of(path, path.stat().st_mtime_ns)
    except Exception as error:
        raise ValueError(f"{path} cannot be imported ({_one_line(error)})") from error


@functools.cache
def _module_of(path: Path, changed: int) -> ModuleType:
    """A file as a module, once: the same file must give the same function, or jit compiles anew."""
    name = f"{_PREFIX}{path.stem}_{abs(hash((path, changed)))}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickling look their module up there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


_PREFIX = "_idp_jax_file_"


def _is_from_file(module: ModuleType) -> bool:
    return module.__name__.startswith(_PREFIX)


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
