"""A run whose model, text and folder are URLs goes on on another machine with the same bits."""

import json

import pytest

from idp_jax.config import Data, Optimizer, Train
from idp_jax.jobs.progress import Progress
from idp_jax.training import train
from tests.helpers import another_machine, tiny_folder


class Stopping(Progress):
    """Ends a training after some steps, as a preemption does."""

    def __init__(self, steps: int):
        self.left = steps

    def bar(self, description, unit=""):
        outer = super().bar(description, unit)
        if unit != "steps":
            return outer

        class Bar:
            def __enter__(bar):
                return self.step

            def __exit__(bar, *error):
                pass

        return Bar()

    def step(self, done, total, note=""):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt


def settings(model, text, out) -> Train:
    return Train(
        model=str(model),
        out=out,
        prompt_length=4,
        tokens=6 * 2 * 16,
        batch_size=2,
        data=Data(train=str(text), sequence_length=16, validation_windows=2),
        optimizer=Optimizer(learning_rate=1e-2),
        evaluate_every=2,
        checkpoint_every=2,
    )


@pytest.mark.usefixtures("optax_promotes")
def test_training_goes_on_elsewhere_with_the_same_bits(store, tmp_path, monkeypatch):
    model, text = tiny_folder(tmp_path / "m"), tmp_path / "text.txt"
    text.write_text(" ".join(f"line {n} of {n * n % 17} words" for n in range(100)))
    store.put(str(model), "/m", recursive=True)
    store.put(str(text), "/text.txt")
    alone = train(settings(model, text, tmp_path / "alone"))
    asked = settings("memory://m", "memory://text.txt", "memory://runs/one")
    with pytest.raises(KeyboardInterrupt):
        train(asked, progress=Stopping(5))
    known = {name.removeprefix("/runs/one/") for name in store.find("/runs/one")}
    assert "config.yaml" in known and any(name.startswith("checkpoints/") for name in known)
    assert "result.json" not in known
    another_machine(monkeypatch, tmp_path / "other")
    found = train(asked)
    assert found["validation_loss"] == alone["validation_loss"]
    name = "adapter/adapter_model.safetensors"
    assert store.cat(f"/runs/one/{name}") == (tmp_path / "alone" / name).read_bytes()
    assert json.loads(store.cat("/runs/one/result.json"))["digest"] == found["digest"]
    assert store.cat("/runs/one/metrics.jsonl") == (tmp_path / "alone/metrics.jsonl").read_bytes()
    another_machine(monkeypatch, tmp_path / "third")
    assert train(asked)["digest"] == found["digest"]
    assert not [path for path in tmp_path.iterdir() if ":" in path.name]
