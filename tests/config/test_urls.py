"""A URL never becomes a local folder in silence: an option takes it as one, or refuses it."""

import dataclasses
from pathlib import Path
from typing import get_origin

import pytest

from idp_jax.cli import COMMANDS, parse
from idp_jax.config import ConfigError, url_of
from idp_jax.config.files import from_dict, from_yaml
from idp_jax.config.groups import Settings
from idp_jax.formats import load_model
from idp_jax.jobs.files import write_text
from idp_jax.jobs.folder import run_folder, written_folder

NEEDED = {"model": "m", "out": "o", "adapter": "a", "to": "dense", "tasks": "t"}
NEEDED |= {"topology": "v5e:2x2", "data": {"train": "t.txt", "held_out": "h.jsonl"}}
NEEDED |= {"recipes": {"prompt": {}}, "prompt": "p", "models": ["m"], "runs": ["a", "b"]}
NEEDED |= {"compressions": {"compressed": {}}}
WHOLE = {
    "model",
    "models",
    "out",
    "runs",
    "tasks",
    "recipes",
    "prompt",
    "compressions",
}  # given in any case


def tree(kind: type) -> dict:
    """Settings of a command that are whole."""
    return {entry.name: NEEDED[entry.name] for entry in dataclasses.fields(kind) if needed(entry)}


def needed(entry) -> bool:
    return entry.name in NEEDED and (
        entry.name in WHOLE
        or (entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING)
    )


def texts(kind: type, before: tuple[str, ...] = ()):
    """The place of every setting that is a text, a path or some of them, and whether some."""
    for entry in dataclasses.fields(kind):
        place = (*before, entry.name)
        if isinstance(entry.type, type) and issubclass(entry.type, Settings):
            yield from texts(entry.type, place)
        elif get_origin(entry.type) is not dict and (
            "str" in str(entry.type) or "Path" in str(entry.type)
        ):
            yield place, "tuple" in str(entry.type)


CASES = [(name, *found) for name, kind in COMMANDS.items() for found in texts(kind)]
# Words of a text, and recipes, whose own settings are checked where they are used.
FREE = {
    "text",
    "prompt",
    "stop",
    "compressions",
    "recipes",
    "adapters",
    "variants",
    "learning_rates",
}


# What `jobs.remote` brings here, models and texts that are read, and takes from here.
TRAINS = {("model",), ("out",), ("teacher", "model"), ("data", "train"), ("data", "validation")}
TAKEN = {"train": TRAINS, "plan": TRAINS, "compress": {("model",), ("calibration",), ("out",)}}
TAKEN |= {name: {("model",), ("out",)} for name in ("convert", "merge", "eval")}
TAKEN |= {"demo": {("out",)}, "sweep": {("out",)}}
TAKEN |= {name: {("model",)} for name in ("generate", "pool-study")}
TAKEN |= {"bench": {("model",), ("compressed",)}}


@pytest.mark.parametrize(("command", "place", "several"), CASES)
def test_an_option_takes_a_url_or_refuses_it(command, place, several):
    kind, url = COMMANDS[command], "gs://bucket/a b"
    if place[-1] in FREE or place[-1] in kind.words:
        return
    settings = tree(kind)
    from_dict(kind, settings)
    *outer, last = place
    part = settings
    for name in outer:
        part[name] = dict(part.get(name) or {})
        part = part[name]
    part[last] = [url] if several else url
    if place in TAKEN.get(command, ()):
        found = from_dict(kind, settings)
        for name in place:
            found = getattr(found, name)
        assert url_of(found[0] if several else found) == url
        return
    with pytest.raises(ConfigError) as raised:
        from_dict(kind, settings)
    said = str(raised.value)
    # Compression stands inside an experiment, too; then the message says so before its option.
    option = ".".join(place if outer != ["compression"] else [last]).replace("_", "-")
    assert f"--{option} {url} is a URL" in said
    assert "mount the bucket" in said and "\n" not in said


def test_there_are_options_with_paths():
    places = {(name, place) for name, place, _ in CASES}
    assert {("train", ("out",)), ("train", ("teacher", "cache")), ("eval", ("adapter",))} <= places
    assert len(places) > 60


@pytest.mark.parametrize("url", ["gs://b/run", "s3://b/run", "memory://run", "az://b/run"])
def test_the_command_line_and_files_take_none(url, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=f"--out {url} is a URL"):
        settings = ["--model", "m", "--adapter", "a", "--tasks", "t"]
        parse(COMMANDS["pool-study"], [*settings, "--out", url], "pool-study")
    taken = parse(COMMANDS["train"], ["--model", "m", "--out", url], "train")
    assert url_of(taken.out) == url
    with pytest.raises(ConfigError, match=f"--config_path {url} is a URL"):
        from_yaml(COMMANDS["train"], url)
    assert not list(tmp_path.iterdir())


def test_plain_names_are_no_urls(tmp_path):
    for name in ("hub:c4:en", "org/name", "a:b/c", "./x", "/a/b", "C:/runs", "https"):
        assert parse(COMMANDS["compress"], [name], "compress").model == name
    words = ["--init.tokens", "text", "--init.text", "http://a is a place"]
    parse(COMMANDS["train"], ["--model", "m", "--out", "o", *words], "train")


def test_libraries_write_to_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for out in ("gs://b/run", Path("gs://b/run")):
        with pytest.raises(ConfigError, match="gs://b/run is a URL"), written_folder(out):
            pass
        with pytest.raises(ConfigError, match="gs://b/run is a URL"):
            write_text(out, "tide")
        with pytest.raises(ConfigError, match="gs://b/run is a URL"), run_folder(Path(out), {}):
            pass
    with pytest.raises(ConfigError, match="nostore://b/model cannot be used"):
        load_model("nostore://b/model")
    assert not list(tmp_path.iterdir())
