"""One process of a training job, for `test_processes.py`: process_worker.py MODEL TEXT OUT
[MESH].
"""

import sys

import jax

MODEL, TEXT, OUT, *MESH = sys.argv[1:]
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2 if MESH else 1)
if MESH:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")

from idp_jax.config import Data, Mesh, Optimizer, Train
from idp_jax.training import train

if __name__ == "__main__":
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
