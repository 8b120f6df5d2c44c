"""Sources and runs on an object store, which stands in memory here."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from idp_jax import load_model, load_tokenizer
from idp_jax.cli import main
from idp_jax.config import Compress, ConfigError, Evaluate, Mesh
from idp_jax.formats.source import open_config
from idp_jax.jobs import remote
from idp_jax.jobs.remote import MANIFEST, brought, local, working
from tests.helpers import another_machine, tiny_folder


def files(store, folder="/run"):
    return {name.removeprefix(f"{folder}/") for name in store.find(folder)}


def test_a_file_and_a_folder_are_copied(store):
    store.pipe({"/texts/a.txt": b"tide", "/m/config.json": b"{}", "/m/x/deep.bin": b"1"})
    assert local("memory://texts/a.txt").read_text() == "tide"
    folder = local("memory://m")
    assert {p.name for p in folder.rglob("*") if not p.name.startswith(".")} == {
        "config.json",
        "x",
        "deep.bin",
    }
    remote._copied.cache_clear()
    store.rm("/m/x/deep.bin")
    store.pipe("/m/config.json", b'{"a": 1}')
    assert (local("memory://m") / "config.json").read_text() == '{"a": 1}'
    assert not (folder / "x" / "deep.bin").exists()


def test_a_local_place_stays_itself(tmp_path):
    assert local(tmp_path / "x") == tmp_path / "x"
    with working(tmp_path / "out") as folder:
        assert folder == tmp_path / "out"


def test_what_is_not_there_is_named(store):
    for url in ("memory://no/model", "nostore://b/model"):
        with pytest.raises(ConfigError, match=f"{url} cannot be used"):
            local(url)
    assert not os.path.exists("memory:")


def test_a_model_is_loaded_from_a_url(store, tmp_path):
    folder = tiny_folder(tmp_path / "m")
    (folder / "optimizer").mkdir()
    (folder / "optimizer" / "state.bin").write_text("large")
    store.put(str(folder), "/models/m", recursive=True)
    assert load_tokenizer("memory://models/m").vocab_size == 259
    assert open_config("memory://models/m").vocab_size == 259
    assert not list((tmp_path / "cache").rglob("*.safetensors"))  # no weights for a plan
    ours, theirs = load_model(folder), load_model("memory://models/m")
    np.testing.assert_array_equal(ours.layers.up.kernel[...], theirs.layers.up.kernel[...])
    assert not list((tmp_path / "cache").rglob("state.bin"))


class TestRun:
    """A run whose folder is a URL."""

    def test_what_is_written_is_there(self, store):
        with working("memory://run") as folder:
            folder.mkdir(parents=True)
            (folder / "metrics.jsonl").write_text("1")
            (folder / ".lock").write_text("me")
            (folder / "result.json").write_text("{}")
        assert files(store) == {"metrics.jsonl", "result.json", MANIFEST}

    def test_another_machine_goes_on(self, store, monkeypatch, tmp_path):
        with working("memory://run") as folder:
            (folder / "checkpoints/1").mkdir(parents=True)
            (folder / "checkpoints/1/x").write_text("one")
        another_machine(monkeypatch, tmp_path / "other")
        with working("memory://run") as folder:
            assert (folder / "checkpoints/1/x").read_text() == "one"
            (folder / "checkpoints/1/x").unlink()
            (folder / "checkpoints/2").mkdir()
            (folder / "checkpoints/2/x").write_text("two")
        assert files(store) == {"checkpoints/2/x", MANIFEST}
        another_machine(
            monkeypatch, tmp_path / "cache"
        )  # the first one: what it holds is old by now
        with working("memory://run") as folder:
            assert not (folder / "checkpoints/1/x").exists()
            assert (folder / "checkpoints/2/x").read_text() == "two"

    def test_a_machine_that_was_killed_goes_on_with_what_it_has(self, store, monkeypatch):
        with working("memory://run") as folder:
            folder.mkdir(parents=True)
            (folder / "a").write_text("1")
        (folder / "b").write_text("written, and not copied any more")
        with working("memory://run") as folder:
            assert (folder / "b").exists()
        assert files(store) == {"a", "b", MANIFEST}

    def test_two_machines_do_not_write_one_run(self, store, monkeypatch, tmp_path):
        with pytest.raises(ConfigError, match="memory://run is being written by another job"):
            with working("memory://run") as first:
                first.mkdir(parents=True)
                (first / "a").write_text("1")
                another_machine(monkeypatch, tmp_path / "other")
                with working("memory://run") as second:
                    second.mkdir(parents=True)
                    (second / "a").write_text("2")
                (first / "a").write_text("33")
        assert store.cat("/run/a") == b"2"

    def test_what_is_somebody_elses_stays(self, store):
        store.pipe("/run/letter.txt", b"dear")
        with pytest.raises(ConfigError, match="memory://run exists and holds no run"):
            with working("memory://run"):
                pass
        assert files(store) == {"letter.txt"}

    def test_it_is_copied_meanwhile(self, store, monkeypatch):
        monkeypatch.setattr(remote, "EVERY", 0.02)
        with working("memory://run") as folder:
            folder.mkdir(parents=True)
            (folder / "a").write_text("1")
            for _ in range(500):
                if store.exists(f"/run/{MANIFEST}"):
                    break
                remote.threading.Event().wait(0.02)
            assert store.cat("/run/a") == b"1"


def test_what_was_never_copied_is_not_lost(store):
    """A run that was killed within its first minute, or while the store could not be reached."""
    with working("memory://run") as folder:
        pass
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "step.bin").write_bytes(b"work")
    with working("memory://run") as again:
        assert (again / "step.bin").read_bytes() == b"work"
    assert files(store) == {"step.bin", MANIFEST}
    store.rm("/run", recursive=True)  # it is to begin anew
    with working("memory://run") as anew:
        assert not (anew / "step.bin").exists()


class TestCommands:
    """What commands write to a URL."""

    def test_a_model_is_compressed_to_a_url_and_scored_from_there(self, store, tmp_path, capsys):
        folder, text = tiny_folder(tmp_path / "m", max_positions=512), tmp_path / "text.txt"
        text.write_text("the tide is out " * 40)
        call = ["compress", str(folder), "--method", "rtn", "--bits", "4", "--group-size", "32"]
        main([*call, "--out", "memory://models/small"])
        assert capsys.readouterr().out.endswith("copied to memory://models/small\n")
        assert {"config.json", "compression.json", MANIFEST} <= files(store, "/models/small")
        call = ["eval", "--model", "memory://models/small", "--perplexity", str(text)]
        call += ["--sequence-length", "16", "--windows", "2", "--out", "memory://runs/x.json"]
        main(call)
        found = json.loads(store.cat("/runs/x.json"))
        assert found["variants"][0]["perplexity"]["windows"] == 2
        assert files(store, "/runs") == {"x.json"}
        for again in (call, [*call[:-1], "memory://models/small/config.json"]):
            before = store.cat(again[-1].removeprefix("memory:/"))
            with pytest.raises(SystemExit):
                main(again)
            assert f"idp-jax: {again[-1]} exists" in capsys.readouterr().err
            assert store.cat(again[-1].removeprefix("memory:/")) == before
        main([*call, "--overwrite"])

    def test_a_place_of_ones_own_stays_itself(self, tmp_path):
        settings = Evaluate(model="m", tasks="knowledge", out=tmp_path / "x.json")
        with brought(settings) as here:
            assert here is settings

    def test_several_processes_do_not_write_to_one(self, store, monkeypatch):
        settings = Compress(model="m", out=Path("memory://b/m"))
        with pytest.raises(ConfigError, match="memory://b/m is a URL, and several processes"):
            with brought(replace(settings, mesh=Mesh(distributed=True))):
                pass
        monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
        with pytest.raises(ConfigError, match="memory://b/m is a URL, and several processes"):
            with brought(settings):
                pass
