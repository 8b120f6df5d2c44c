"""A finished run is one whose result and adapter are there, whole, and of what it read."""

import json
import shutil

import numpy as np
import pytest

from idp_jax.config import ConfigError, Data, Train
from idp_jax.jobs.files import contents
from idp_jax.training import train
from idp_jax.training.done import inputs
from tests.helpers import tiny_folder

LENGTH = 16  # tokens of a window


pytestmark = pytest.mark.usefixtures("optax_promotes")


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Train:
    """A run of two steps that has ended."""
    folder = tmp_path_factory.mktemp("files")
    tiny_folder(folder / "model", num_layers=1)
    words = np.random.default_rng(0).choice(["tide ", "ship ", "lamp "], 130)
    (folder / "text.txt").write_text("".join(words))
    data = Data(train=str(folder / "text.txt"), sequence_length=LENGTH, validation_windows=2)
    sizes = {"batch_size": 2, "evaluate_every": 2, "tokens": 2 * 2 * LENGTH, "prompt_length": 2}
    config = Train(model=str(folder / "model"), out=folder / "run", data=data, **sizes)
    train(config)
    return config


@pytest.fixture
def run(finished, tmp_path) -> Train:
    """The same run with its inputs, for a test of its own: the paths in it stay."""
    folder = finished.out.parent
    shutil.copytree(folder, tmp_path / "kept")
    yield finished
    shutil.rmtree(folder)
    shutil.copytree(tmp_path / "kept", folder)


def test_an_adapter_that_is_gone_is_written_again(run):
    before, result = (
        contents(run.out / "adapter"),
        json.loads((run.out / "result.json").read_text()),
    )
    assert set(result["adapter"]) == set(before)
    for gone in ("adapter", "result.json"):
        path = run.out / gone
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        again = train(run)
        assert again["validation_loss"] == result["validation_loss"]
        assert contents(run.out / "adapter") == before
    assert not (run.out / ".lock").exists()


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
@pytest.mark.parametrize("change", ["junk", "gone"])
def test_an_adapter_that_is_another_is_named(run, name, change):
    file = run.out / "adapter" / name
    file.write_bytes(b"junk") if change == "junk" else file.unlink()
    with pytest.raises(ConfigError, match=rf"{name} is not as this run wrote it; remove .*adapter"):
        train(run)
    shutil.rmtree(run.out / "adapter")
    train(run)
    assert (run.out / "adapter" / name).stat().st_size > 4


def test_a_file_of_ones_own_beside_the_adapter_stays(run):
    (run.out / "adapter" / "notes.md").write_text("mine")
    train(run)  # complete, and only reported
    (run.out / "result.json").unlink()
    with pytest.raises(ValueError, match=r"adapter holds notes\.md, which was added or changed"):
        train(run)
    assert (run.out / "adapter" / "notes.md").read_text() == "mine"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"adapter": {}, "config": {"seed": 1}}', "null"])
def test_a_result_that_is_none_is_named(run, text):
    (run.out / "result.json").write_text(text)
    with pytest.raises(ConfigError, match=r"result\.json is (damaged|not what this run found)"):
        train(run)
    (run.out / "result.json").unlink()
    assert train(run)["best_step"] >= 0


@pytest.mark.parametrize("value", [0.001, None, "junk", "gone"])
def test_numbers_that_were_changed_are_no_result(run, value):
    file = run.out / "result.json"
    result = json.loads(file.read_text())
    if value == "gone":
        del result["validation_loss"]
    else:
        result["validation_loss"] = value
    file.write_text(json.dumps(result))
    with pytest.raises(ConfigError, match=r"result\.json is not what this run found; remove it"):
        train(run)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model/model.safetensors", "another model: model.safetensors has changed since"),
        ("model/tokenizer.json", "another model: tokenizer.json has changed since"),
        ("text.txt", "another data.train: text.txt has changed since"),
    ],
)
def test_what_was_swapped_is_named(run, name, message):
    file = run.out.parent / name
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    for done in (True, False):
        with pytest.raises(ConfigError, match=message):
            train(run)
        if done:
            (run.out / "result.json").unlink()


def test_code_of_ones_own_is_of_what_a_run_reads(tmp_path):
    (tmp_path / "model").mkdir()
    for name in ("loss.py", "choice.py"):
        (tmp_path / name).write_text("1")
    config = Train(
        model=str(tmp_path / "model"),
        out=tmp_path / "run",
        data=Data(train=str(tmp_path / "text.txt")),
        objective=f"kl + 0.5*{tmp_path / 'loss.py'}:mine(power=2)",
        selector=f"{tmp_path / 'choice.py'}:score",
    )
    before = inputs(config)
    for option, name in (("objective", "loss.py"), ("selector", "choice.py")):
        (tmp_path / name).write_text("2")
        found = inputs(config)
        assert {key for key in found if found[key] != before[key]} == {
            f"{option} {tmp_path / name}"
        }
        before = found
