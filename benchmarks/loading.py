"""The most memory and the time that loading a model takes, beside the bars.

Writes a randomly initialised LLaMA, dense or packed to 3 bits, and loads it in processes of their
own: one with one device, and two with four devices each that share the parameters (fsdp 8). What
the arrays of a process take is in the host's memory on a CPU, so the peak counts from the process'
memory before the load, and the bar is 1.2 times its share of the model and two layers.

    python benchmarks/loading.py                          # 400 MB, dense and packed
    python benchmarks/loading.py --before ../main         # beside another checkout's
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "vocab_size": 8192,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
}
_FACTOR, _LAYERS = 1.2, 2  # of the bar
_RATIO = 1.1  # of the time before, with --before

_LOAD = """
import ctypes, gc, json, sys, time
import jax
model, dtype, processes, warm = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
mesh = None
if processes > 1:
    jax.config.update("jax_num_cpu_devices", 4)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    from idp_jax.config import Mesh
    from idp_jax.processes import mesh_of
    mesh = mesh_of(Mesh(fsdp=-1))
from idp_jax import load_model

def memory(name):
    return int(open("/proc/self/status").read().split(name + ":")[1].split()[0]) * 1024

load_model(warm, dtype=dtype, mesh=mesh)  # imports and what is compiled once
gc.collect()
ctypes.CDLL(None).malloc_trim(0)
open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here on
before, began = memory("VmRSS"), time.perf_counter()
loaded = jax.block_until_ready(load_model(model, dtype=dtype, mesh=mesh))
seconds = time.perf_counter() - began
leaves = jax.tree.leaves(loaded)
share = sum(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards)
whole = sum(leaf.nbytes for leaf in leaves)
layers = sum(leaf.nbytes for leaf in jax.tree.leaves(loaded.layers)) / loaded.config.num_layers
print(json.dumps(dict(seconds=seconds, peak=memory("VmHWM") - before, share=share, whole=whole,
                      layer=layers)))
"""


def load(
    checkout: Path, model: Path, dtype: str, processes: int, warm: Path
) -> list[dict[str, float]]:
    """What every process says of its load."""
    own = {key: value for key, value in os.environ.items() if not key.startswith("XLA_")}
    own |= {"PYTHONPATH": str(checkout), "JAX_PLATFORMS": "cpu"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        own["JAX_COORDINATOR_ADDRESS"] = f"127.0.0.1:{free.getsockname()[1]}"
    started = []
    for number in range(processes):
        several = {"JAX_NUM_PROCESSES": str(processes), "JAX_PROCESS_ID": str(number)}
        started.append(
            subprocess.Popen(
                [sys.executable, "-c", _LOAD, str(model), dtype, str(processes), str(warm)],
                stdout=subprocess.PIPE,
                text=True,
                cwd=checkout,  # which Python searches first
                env=own | (several if processes > 1 else {}),
            )
        )
    said = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise SystemExit(f"loading {model} failed")
    return [json.loads(text.splitlines()[-1]) for text in said]


def write(folder: Path, layers: int, bits: int | None) -> Path:
    """A model on disk: in bfloat16, or its matrices packed."""
    from random_model import write_model

    from idp_jax.compression.job import compress
    from idp_jax.config import Compress

    write_model(folder, {**_CONFIG, "num_hidden_layers": layers})
    if bits is None:
        return folder
    packed = folder.with_name(f"{folder.name}-packed")
    compress(Compress(model=str(folder), out=packed, method="rtn", bits=bits, grid="minmax"))
    return packed


def main() -> None:
    """Prints a line for every load; fails above a bar."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=14)
    parser.add_argument("--before", type=Path, help="another checkout, whose time is the baseline")
    parser.add_argument("--repeats", type=int, default=3, help="loads of which the fastest counts")
    options = parser.parse_args()
    here, missed = Path(__file__).parents[1], []
    with tempfile.TemporaryDirectory() as scratch:
        for bits in (None, 3):
            kind = "dense bfloat16" if bits is None else f"packed {bits} bits"
            model = write(Path(scratch) / f"model-{bits}", options.layers, bits)
            warm = write(Path(scratch) / f"warm-{bits}", 1, bits)
            for processes in (1, 2):
                for name, checkout in (("before", options.before), ("here", here)):
                    if checkout is None:
                        continue
                    runs = [
                        load(checkout.absolute(), model, "bfloat16", processes, warm)
                        for _ in range(options.repeats)
                    ]
                    seconds = min(max(said["seconds"] for said in run) for run in runs)
                    worst = max((said for run in runs for said in run), key=lambda x: x["peak"])
                    bar = _FACTOR * worst["share"] + _LAYERS * worst["layer"]
                    print(
                        f"{kind:15} {processes} processes {name:7}"
                        f"{worst['whole'] / 1e6:5.0f} MB, {worst['share'] / 1e6:4.0f} MB of it a "
                        f"process: peak {worst['peak'] / 1e6:5.0f} MB, bar {bar / 1e6:4.0f}; "
                        f"{seconds:.2f} s",
                        flush=True,
                    )
                    if name == "before":
                        baseline = seconds
                        continue
                    if worst["peak"] > bar:
                        missed.append(f"{kind}, {processes} processes: peak above the bar")
                    if options.before is not None and seconds > _RATIO * baseline:
                        missed.append(f"{kind}, {processes} processes: slower than before")
    if missed:
        raise SystemExit("\n".join(missed))


if __name__ == "__main__":
    main()
