"""The command line: `idp-jax COMMAND ...`; `train.py` and `eval.py` are two of its commands.

Every command is a dataclass of `config`: its settings come from a YAML file (`--config_path FILE`)
and from options, which win, and are checked once. An error is one line and a non-zero exit. The
invariant: nothing that takes long to import (jax, transformers) is imported before options are
parsed, so that --help is there at once.
"""

import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import inspect
import io
import itertools
import logging
import os
import re
import sys
from typing import Any

from idp_jax import __version__
from idp_jax.jobs import signals

with signals.handled():  # these take the longest until a command can begin
    from idp_jax import config
    from idp_jax.config.files import part_from_dict, read_yaml
    from idp_jax.config.presets import PRESETS, read_preset
    from idp_jax.jobs import compiled, failures, remote

COMMANDS: dict[str, type] = {
    "demo": config.Demo,
    "compress": config.Compress,
    "convert": config.Convert,
    "train": config.Train,
    "plan": config.Plan,
    "merge": config.Merge,
    "eval": config.Evaluate,
    "compare": config.Compare,
    "generate": config.Generate,
    "bench": config.Bench,
    "sweep": config.Sweep,
    "reproduce": config.Reproduce,
    "pool-study": config.PoolStudy,
}

# Called again, these go on from what an interrupted call has finished.
_RESUMING = ("demo", "compress", "train", "eval", "sweep", "reproduce", "pool-study")

# What libraries print on their own account; our bars and tables say the same.
_QUIET = {"TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1", "TF_CPP_MIN_LOG_LEVEL": "2"}


def main(arguments: list[str] | None = None) -> None:
    """Runs one command; exits with 0, 1 (it failed) or 2 (it was asked for the impossible).

    Interrupted, it exits with 130 (SIGINT) or 143 (SIGTERM).
    """
    with failures.calm_streams(), signals.handled():
        _main(arguments)


def _main(arguments: list[str] | None) -> None:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        raise SystemExit(0)
    if arguments[0] == "--version":
        print(f"idp-jax {__version__}")
        raise SystemExit(0)
    name, *rest = arguments
    if name not in COMMANDS:
        _fail(f"no command {name!r}; there are {', '.join(COMMANDS)}", 2)
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    for handler in logging.getLogger().handlers:
        # What orbax raises it logs before, at length, through absl.
        handler.addFilter(lambda record: record.name != "absl")
    for variable, value in _QUIET.items():
        os.environ.setdefault(variable, value)
    settings = None
    try:
        settings = parse(COMMANDS[name], rest, f"idp-jax {name}")
        compiled.keep_programs()
        _hide_torch()
        command = importlib.import_module(f"idp_jax.commands.{name.replace('-', '_')}")
        signals.begin(resumes=name in _RESUMING)
        with remote.brought(settings) as here:
            command.run(here)
        if here is not settings:
            print(f"copied to {config.url_of(settings.out)}")
    except BaseException as error:
        if os.environ.get("IDP_JAX_TRACEBACK") or not failures.is_failure(error):
            raise
        message, status = failures.explained(error, getattr(settings, "out", None))
        if failures.lost_a_process(error):  # the interpreter's way out would wait for it
            signals.leave(message, status)
        failures.failed_here(message, status)
        _fail(message, status)


def _hide_torch() -> None:
    """Keeps transformers from importing torch where it is installed; we may still import it.

    Neither a configuration nor a tokenizer needs those 200 MB and some seconds.
    """
    if "torch" in sys.modules or "transformers" in sys.modules:
        return
    find = importlib.util.find_spec
    try:
        importlib.util.find_spec = lambda name, *rest: (
            None if name == "torch" else find(name, *rest)
        )
        import transformers.utils.import_utils as imports

        imports.is_torch_available()  # looked up once
    finally:
        importlib.util.find_spec = find


def parse(kind: type, arguments: list[str], program: str) -> Any:
    """Reads a command's settings from a YAML file, if one is named, and from options, which win.

    What neither says is taken from the preset, if one is named; its source is printed.

    Raises:
        ConfigError: an unreadable file, an unknown key or a value out of range.
    """
    import tyro

    if getattr(kind, "takes_file", False) and arguments and not arguments[0].startswith("-"):
        arguments = ["--config_path", *arguments]
    path, arguments = _taken("config_path", "a YAML file", arguments)
    tree = {} if path is None else read_yaml(path)
    if getattr(kind, "has_presets", False):
        preset, arguments = _taken("preset", f"one of {', '.join(PRESETS)}", arguments)
        tree |= {"preset": preset} if preset else {}
    # The file's settings are defaults; what neither it nor the class gives is still asked for.
    given = part_from_dict(kind, tree, path or "--preset")
    for entry in dataclasses.fields(kind):
        if entry.name not in given and entry.default_factory is not dataclasses.MISSING:
            given[entry.name] = entry.default_factory()
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            settings = tyro.cli(
                functools.partial(kind, **given),
                args=arguments,
                prog=program,
                description=_about(kind),
            )
        if tree.get("preset"):
            print(f"preset {tree['preset']}: {read_preset(tree['preset']).source}", file=sys.stderr)
        return settings
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise config.ConfigError(_first_paragraph(complaint.getvalue(), program)) from None


def _first_paragraph(box: str, program: str) -> str:
    """What tyro says in its frame: behind the title, above the first rule.

    Where the output's encoding is ASCII the frame is another, with a rule below its title.
    """
    lines = [line.strip("│ ") for line in box.splitlines()][1:]
    is_rule = lambda line: line.startswith(("─", "---"))
    said = itertools.takewhile(lambda line: not is_rule(line), itertools.dropwhile(is_rule, lines))
    text = re.sub(r"^Error parsing \w+: ", "", " ".join(said))
    choice = re.match(r"invalid choice '(.*)' for argument '(.*)'\. Expected one of \((.*)\)", text)
    if choice:
        value, option, allowed = choice.groups()
        allowed = allowed.replace("'", "")
        return f"{option} {value} is not one of {allowed}"
    return f"{text}; see {program} --help" if text else box


def _about(kind: type) -> str:
    about = inspect.cleandoc(kind.__doc__ or "")
    about += "\n\nOptions may also stand in a file: --config_path FILE.yaml"
    if getattr(kind, "has_presets", False):
        about += "\n\nRecipes of papers, beneath file and options: --preset NAME, one of"
        about += f"\n\n{', '.join(PRESETS)}"
    return about


def _taken(option: str, what: str, arguments: list[str]) -> tuple[str | None, list[str]]:
    """Takes `--option VALUE` (or with `-` for `_`, or with `=`) out of the arguments."""
    found, rest, items = None, [], iter(arguments)
    for item in items:
        name, equals, value = item.partition("=")
        if name not in (f"--{option}", f"--{option.replace('_', '-')}"):
            rest.append(item)
            continue
        found = value if equals else next(items, None)
        if not found:
            raise config.ConfigError(f"--{option} needs {what}")
    return found, rest


def _usage() -> str:
    rows = "\n".join(
        f"  {name:10} {(kind.__doc__ or '').splitlines()[0]}" for name, kind in COMMANDS.items()
    )
    return (
        "usage: idp-jax COMMAND [options]\n\n"
        "Compress language models, repair them with prompts, and measure what came back.\n\n"
        f"{rows}\n\n"
        "`idp-jax COMMAND --help` shows a command's options, `idp-jax --version` the version.\n"
        f"Compiled programs are kept in ~/.cache/idp-jax; {compiled.FOLDER} names another\n"
        'folder, or "" for none.'
    )


def _fail(message: str, status: int) -> None:
    print(f"idp-jax: {message}", file=sys.stderr)
    raise SystemExit(status)
