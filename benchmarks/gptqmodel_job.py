"""The job that `compression.py` measures, done by GPTQModel with its own defaults.

A process of its own that imports nothing of ours. Arguments: model folder, output folder, file of
documents (JSON lines), windows, tokens of a window, bits, group size.
"""

import json
import sys
from pathlib import Path

from gptqmodel import GPTQModel, QuantizeConfig
from transformers import AutoTokenizer


def main() -> None:
    """Quantises and saves; the settings that GPTQModel resolved are printed as the last line."""
    folder, out, text = sys.argv[1:4]
    samples, length, bits, group_size = map(int, sys.argv[4:])
    rows = [json.loads(line) for line in Path(text).read_text(encoding="utf-8").splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("\n\n".join(row["text"] for row in rows), add_special_tokens=False).input_ids
    windows = [ids[start : start + length] for start in range(0, samples * length, length)]
    settings = QuantizeConfig(bits=bits, group_size=group_size, sym=False)
    model = GPTQModel.load(folder, settings)
    model.quantize(windows)
    model.save(out)
    print(f"\n{settings!r}")


if __name__ == "__main__":
    main()
