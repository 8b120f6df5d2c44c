"""Damaged GGUF files: refused in one line, or read as transformers reads them."""

import random
import resource

import numpy as np
import pytest

from idp_jax import load_model, load_tokenizer
from tests.formats.gguf_files import tiny_model, write_file
from tests.helpers import FUZZ_TRIES, tiny_ids

TEXT = "hello <s>Zwölf 3.14</s>\n"
MEMORY = 2**30  # what one try may add to the peak, over a file of some 100 KB

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A file with everything that is read, and where its tensors start."""
    path = tmp_path_factory.mktemp("whole") / "tiny.gguf"
    fields = {
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "llama.vocab_size": 262,
        "llama.rope.scaling.type": "none",
        "general.alignment": 32,
    }
    write_file(path, tiny_model(), fields)
    from idp_jax.formats.gguf_header import read_header

    return path, min(info.start for info in read_header(path).tensors.values())


def mutated(content: bytes, head: int, chance: random.Random) -> bytes:
    """One to three changes, most of them in the metadata and the tensor table."""
    changed = bytearray(content)
    for _ in range(chance.randint(1, 3)):
        end = head if chance.random() < 0.9 else len(changed)
        at = chance.randrange(min(end, len(changed)))
        kind = chance.choice(["bit", "byte", "word", "cut", "drop", "copy"])
        if kind == "bit":
            changed[at] ^= 1 << chance.randrange(8)
        elif kind == "byte":
            changed[at] = chance.choice([0, 1, 9, 127, 128, 255])
        elif kind == "word":
            word = chance.choice([0, 1, 2**31, 2**32 - 1, 2**61, 2**63, 2**64 - 1])
            changed[at : at + 8] = word.to_bytes(8, "little")
        elif kind == "cut":
            del changed[max(at, 1) :]
        elif kind == "drop":
            del changed[at : at + chance.randint(1, 16)]
        else:
            changed[at:at] = changed[at : at + chance.randint(1, 16)]
    return bytes(changed)


def ours(path):
    """Logits and token ids, each None with the message where it is refused."""
    return outcome(lambda: np.asarray(load_model(path)(IDS))), outcome(lambda: tokens(path))


IDS = tiny_ids(tiny_model())


def tokens(path):
    return np.asarray(load_tokenizer(path)(TEXT)["input_ids"])


def outcome(read):
    try:
        return read()
    except ValueError as error:
        assert str(error) and "\n" not in str(error), repr(error)
        return None


def theirs(path):
    """What transformers makes of the same file, or None where it fails."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def logits():
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name)
        with torch.no_grad():
            return model(input_ids=torch.tensor(np.array(IDS))).logits.float().numpy()

    def ids():
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        return np.asarray(tokenizer(TEXT)["input_ids"])

    found = []
    for read in (logits, ids):
        try:
            found.append(read())
        except Exception:
            found.append(None)
    return found


def same(found, wanted) -> bool:
    if wanted is None or found.shape != wanted.shape:
        return False
    if not np.isfinite(wanted).all():  # a weight near 1e38: what overflows first is chance
        return not np.isfinite(found).all()
    return np.allclose(found, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("default")  # those of torch and transformers on broken files
def test_a_mutated_file_is_refused_or_read_as_transformers_reads_it(whole, tmp_path):
    pytest.importorskip("torch")
    source, head = whole
    content, right = source.read_bytes(), ours(source)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    path, read = tmp_path / "tiny.gguf", 0
    for seed in range(FUZZ_TRIES):
        path.write_bytes(mutated(content, head, random.Random(seed)))
        found = ours(path)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - peak
        assert grown < MEMORY, f"seed {seed} took {grown} bytes"
        differs = [f is not None and not same(f, r) for f, r in zip(found, right, strict=True)]
        read += found[0] is not None
        if any(differs):
            reference = theirs(path)
            for position in range(2):
                wrong = differs[position] and not same(found[position], reference[position])
                assert not wrong, f"seed {seed}: {found[position]} is not {reference[position]}"
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert read > FUZZ_TRIES // 20, "hardly any file was read: the changes are too rough"
