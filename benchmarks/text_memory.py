"""Peak memory of compress, train and eval on a long text beside that on a short one.

Each command runs in a process of its own on one line of so many bytes, as .txt, as .txt.gz and as
one row of a .jsonl file. The tokenizer has a token for every byte, the most that a text can have.

    python benchmarks/text_memory.py
"""

import argparse
import gzip
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from random_model import write_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

_LENGTH = 64
_SHORT, _LONG = 50_000, 50_000_000  # bytes
_LINE = "The quick brown fox jumps over 12 lazy dogs, again and again; "
_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
}


def write_byte_tokenizer(folder: Path) -> None:
    """A tokenizer whose tokens are the 256 bytes."""
    names = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={n: i for i, n in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def write_line(file: Path, size: int) -> Path:
    """A text of one line."""
    before, after = ('{"text": "', '"}\n') if file.suffix == ".jsonl" else ("", "")
    opened = gzip.open if file.suffix == ".gz" else open
    with opened(file, "wt") as out:
        out.write(before)
        for _ in range(size // len(_LINE)):
            out.write(_LINE)
        out.write(after)
    return file


def commands(model: Path, text: Path, out: Path) -> dict[str, tuple]:
    """The arguments of each command."""
    length = ("--sequence-length", _LENGTH)
    return {
        "compress": (
            *("compress", model, "--out", out / "compressed", "--calibration", text),
            *("--samples", 8, "--group-size", 32, *length),
        ),
        "train": (
            *("train", "--model", model, "--out", out / "run", "--data.train", text),
            *("--data.sequence-length", _LENGTH, "--data.validation-windows", 4),
            *("--prompt-length", 4, "--batch-size", 2, "--tokens", 40 * _LENGTH),
        ),
        "eval": (
            *("eval", "--model", model, "--out", out / "results.json", "--perplexity", text),
            *("--windows", 8, *length),
        ),
    }


def peak(arguments: tuple, log: Path) -> tuple[float, float]:
    """Peak memory (MB) and seconds of a command."""
    began = time.monotonic()
    # Linux counts the peak of the process that starts another as the other's too (ru_maxrss), but
    # not in what a process reads of itself.
    call = (
        "import atexit; from idp_jax.cli import main\n"
        "status = lambda: open('/proc/self/status').read().split('VmHWM:')[1].split()[0]\n"
        "atexit.register(lambda: print('peak', status()))\n"
        "main()"
    )
    command = [sys.executable, "-c", call, *map(str, arguments)]
    variables = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    with log.open("w") as file:
        code = subprocess.run(command, stdout=file, stderr=file, env=variables).returncode
    if code:
        raise SystemExit(f"{arguments[0]} failed:\n{log.read_text()[-2000:]}")
    return int(log.read_text().split("peak ")[-1]) / 1024, time.monotonic() - began


def main() -> None:
    """Prints a line for every command and kind of text."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kinds", nargs="+", default=[".txt", ".txt.gz", ".jsonl"])
    kinds = parser.parse_args().kinds
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / "model"
        write_model(model, _CONFIG)
        write_byte_tokenizer(model)
        for kind in kinds:
            peaks = []
            for size in (_SHORT, _LONG):
                out = Path(scratch) / f"{kind}-{size}"
                out.mkdir()
                text = write_line(out / f"line{kind}", size)
                asked = commands(model, text, out)
                peaks.append({name: peak(asked[name], out / "log") for name in asked})
            for name, (short, _) in peaks[0].items():
                long, seconds = peaks[1][name]
                print(
                    f"{kind:8} {name:9} {short:6.0f} MB on {_SHORT} bytes, {long:6.0f} MB on "
                    f"{_LONG} in {seconds:3.0f} s: {long / short:.2f} times",
                    flush=True,
                )


if __name__ == "__main__":
    main()
