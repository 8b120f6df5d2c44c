"""One process of a job, for `test_processes.py`.

process_worker.py train|compress|load MODEL TEXT OUT [MESH]
"""

import sys

import jax

COMMAND, MODEL, TEXT, OUT, *MESH = sys.argv[1:]
DEVICES = {"train": 2, "compress": 4, "load": 2}[COMMAND]
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", DEVICES if MESH else 1)
if MESH:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")

from pathlib import Path

from idp_jax.commands.compress import compress
from idp_jax.config import Compress, Data, Mesh, Optimizer, Train
from idp_jax.formats import later, load_model
from idp_jax.processes import mesh_of
from idp_jax.training import train


def training() -> None:
    """A few steps of a LoRA."""
    train(
        Train(
            model=MODEL,
            out=OUT,
            method="lora",
            tokens=5 * 4 * 16,
            batch_size=4,
            data=Data(train=TEXT, sequence_length=16, validation_windows=4),
            optimizer=Optimizer(learning_rate=1e-2),
            evaluate_every=2,
            mesh=Mesh(data=2, fsdp=2) if MESH else Mesh(),
        )
    )


def compressing() -> None:
    """A job on text that the model writes itself."""
    compress(
        Compress(
            model=MODEL,
            out=Path(OUT),
            calibration=TEXT,
            group_size=32,
            samples=8,
            sequence_length=32,
            mesh=Mesh(data=4, model=2) if MESH else Mesh(),
        )
    )


def loading() -> None:
    """A model on all devices; prints the bytes of its matrices that this process read."""
    read, fill = [0], later._fill

    def counted(layer, indices, buffers):
        fill(layer, indices, buffers)
        read[0] += sum(buffer.nbytes for buffer in buffers)

    later._fill = counted
    load_model(MODEL, mesh=mesh_of(Mesh(fsdp=-1)))
    print(read[0], file=sys.stderr)


if __name__ == "__main__":
    {"train": training, "compress": compressing, "load": loading}[COMMAND]()
