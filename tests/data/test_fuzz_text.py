"""Damaged text files are read, or refused in one line that names the file; nothing else happens."""

import gzip
import json
import random

import pytest

from idp_jax.data.text import join_documents, read_documents
from tests.helpers import FUZZ_TRIES

_ROWS = [
    {"text": "one\r\n two \u2028 naïve 漢字 😀"},
    {"page": "another", "number": 1.5e3, "list": [[1, {}], None, True]},
    {"text": '\\ " \u0001', "page": None},
    {"text": "word " * 300},
]
_PIECES = [
    *(b"\xff", b"\x00", b"\r", b"\n", b'"', b"\\", b"\\ud83d", b"\\u00", b"{", b"}", b"[" * 3000),
    *(b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff", b"\xed\xa0\x80", b"\x1f\x8b", b"1" * 5000),
    *(b"NaN", b"1e999", b'"text": 1,', b'"text": ', b"\xc3", b"\xe2\x80\xa8", b"\x1a"),
]


def damaged(data: bytes, rng: random.Random) -> bytes:
    """The bytes with one to four damages: changed, cut, doubled, or something put in."""
    for _ in range(rng.randint(1, 4)):
        place, end = sorted(rng.choices(range(len(data) + 1), k=2))
        end = min(end, place + rng.choice([1, 8, 400]))
        middle = rng.choice(
            [rng.choice(_PIECES), rng.randbytes(rng.randint(1, 6)), b"", data[place:end] * 2]
        )
        data = data[:place] + middle + data[end:]
        if rng.random() < 0.1:
            data = data[:place]
    return data


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".txt.gz", ".jsonl.gz"])
def test_a_damaged_file_is_read_or_refused(tmp_path, kind, encoding):
    rng = random.Random(f"{kind} {encoding}")
    lines = "".join(json.dumps(row, ensure_ascii=bool(n % 2)) + "\n" for n, row in enumerate(_ROWS))
    plain, refused = lines.encode(encoding), 0
    file = tmp_path / f"a{kind}"
    for _ in range(FUZZ_TRIES):
        if not kind.endswith(".gz"):
            data = damaged(plain, rng)
        elif rng.random() < 0.5:
            data = damaged(gzip.compress(plain, mtime=0), rng)
        else:
            data = gzip.compress(damaged(plain, rng), mtime=0)
        file.write_bytes(data)
        try:
            text = "".join(join_documents(read_documents(file, rng.choice([None, 0]))))
        except ValueError as error:
            message, refused = str(error), refused + 1
            assert len(message.splitlines()) == 1 and str(file) in message, message
            unpacked = "holds no text" in message or "cannot read" in message
            assert unpacked or f"{file}:" in message, message
        else:
            text.encode()
    assert 0 < refused < FUZZ_TRIES or kind == ".txt"
