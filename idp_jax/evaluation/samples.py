"""What lm-evaluation-harness says of every item: rows in memory, or its samples_TASK_DATE.jsonl.

Versions 0.4.13 and 0.5 write the same keys, whatever the model's backend: `doc_hash`, `prompt_hash`
and `filter`, the names of an item's `metrics`, and each of these with its value. The invariant: an
item counts once, so a file that holds one twice is refused.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from idp_jax.config.groups import ConfigError
from idp_jax.evaluation.results import TaskResult, VariantResult, read
from idp_jax.evaluation.statistics import accuracy_interval

HASH = 16  # digits of the harness's hash of an item that are kept
_FILE = re.compile(r"samples_(?P<task>.+?)(_(?P<date>\d{4}-\d\d-\d\dT[\d.-]+))?\.jsonl")
_NEEDED = ("doc_id", "doc", "doc_hash", "prompt_hash", "filter", "metrics", "resps")
_LONGEST_LABEL = 60  # characters; longer texts are no names of groups
_REMEDY = "give samples_*.jsonl of lm_eval --log_samples (0.4.13 or later)"


def read_runs(address: str | Path) -> list[VariantResult]:
    """The variants at an address.

    Args:
        address: a file of results, `FILE:NAME` for one variant of it, a samples_*.jsonl of the
            harness, or a folder of them.

    Raises:
        ConfigError: nothing of the kind is there; it is named.
    """
    path, name = Path(address), None
    if not path.exists() and ":" in str(address):
        place, _, rest = str(address).partition(":")
        path, name = Path(place), rest
    if not path.exists():
        raise ConfigError(
            f"there is no file or folder {address}; give a file of results, FILE:VARIANT, "
            "samples_*.jsonl of lm_eval --log_samples, or its folder"
        )
    if path.is_dir() or path.suffix == ".jsonl":
        return [read_samples(path)]
    results = read(path)
    if name is not None:
        return [results.variant(name)]
    if not results.variants:
        raise ConfigError(f"{path} holds no variants; give what was evaluated")
    return results.variants


def read_samples(path: Path) -> VariantResult:
    """A run of the harness as a variant.

    Args:
        path: a file of samples, or a folder with one for each task; it may lie one folder deeper,
            where the harness puts it.

    Raises:
        ConfigError: no samples, two files of one task, or a row that is none; it names the row.
    """
    files: dict[str, Path] = {}
    for file in _files(path):
        found = _FILE.fullmatch(file.name)
        task = found["task"] if found else file.stem
        if task in files:
            raise ConfigError(f"{path} holds two files of task {task}; name one of them")
        files[task] = file
    tasks, names = {}, set()
    for task, file in sorted(files.items()):
        about = _about(file)
        names.add(about.get("model_name"))
        settings = about.get("n-shot", {}).get(task), about.get("versions", {}).get(task)
        tasks[task] = _task(file, *settings)
    name = names.pop() if len(names) == 1 else None
    return VariantResult(name=name or str(path), role="dense", model=name or str(path), tasks=tasks)


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    found = sorted(path.glob("samples_*.jsonl")) or sorted(path.glob("*/samples_*.jsonl"))
    if not found:
        raise ConfigError(f"{path} holds no samples; {_REMEDY}")
    folders = sorted({file.parent.name for file in found})
    if len(folders) > 1:
        raise ConfigError(f"{path} holds runs of several models ({', '.join(folders)}); name one")
    return found


def _about(file: Path) -> dict[str, Any]:
    """What the harness's results of the same run say, where they lie beside its samples."""
    date = (_FILE.fullmatch(file.name) or {"date": None})["date"]
    for beside in sorted(file.parent.glob(f"*_{date}.json")) if date else ():
        try:
            found = json.loads(beside.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(found, dict) and isinstance(found.get("versions"), dict):
            return found
    return {}


def _task(file: Path, num_fewshot: int | None, version: Any) -> TaskResult:
    rows = sorted(_rows(file), key=lambda row: row["doc_id"])
    if not rows:
        raise ConfigError(f"{file} holds no items; {_REMEDY}")
    counts = Counter((row["doc_id"], row["filter"]) for row in rows)
    doubled = sorted({item for (item, _), count in counts.items() if count > 1})
    if doubled:
        raise ConfigError(
            f"{file}: {len(doubled)} items are doubled (the first is item {doubled[0]}); evaluate "
            "again into another folder"
        )
    scores = item_scores(rows)
    metrics = {name: sum(values) / len(values) for name, values in scores.items()}
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise ConfigError(f"{file}: {name} of an item is not finite; evaluate again without it")
    binary = {name: values for name, values in scores.items() if set(values) <= {0.0, 1.0}}
    intervals = {name: accuracy_interval(values) for name, values in binary.items()}
    items = [row for row in rows if row["filter"] == rows[0]["filter"]]
    return TaskResult(
        metrics=metrics,
        interval={name: (found.low, found.high) for name, found in intervals.items()},
        items=len(items),
        num_fewshot=num_fewshot,
        version=version,
        samples=scores,
        documents=[row["doc_hash"][:HASH] for row in items],
        **item_facts(items),
    )


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    try:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _row(line, f"{file}:{number}")
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not UTF-8; {_REMEDY}") from error


def _row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is not JSON ({error}); {_REMEDY}") from error
    if not isinstance(row, dict):
        raise ConfigError(f"{where} is no JSON object; {_REMEDY}")
    missing = [key for key in _NEEDED if key not in row]
    missing += [str(name) for name in row.get("metrics", ()) if name not in row]
    if missing:
        raise ConfigError(f"{where} lacks {missing[0]!r}; {_REMEDY}")
    for key, kind in (("doc_id", int), ("doc_hash", str), ("metrics", list), ("resps", list)):
        if not isinstance(row[key], kind):
            raise ConfigError(f"{where}: {key} is {row[key]!r:.40}; {_REMEDY}")
    row.pop("arguments", None)  # long, and of no use here
    return row


def item_scores(rows: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """By metric one number per item, in the order of the rows.

    The harness names metrics `metric,filter`; those of a task's first filter, which is the only
    one of most tasks, lose it. Metrics that only exist over a whole text are left out, as are those
    that some items lack; bits per byte are those of each document.
    """
    found: dict[str, list] = {}
    sizes: dict[str, int] = {}
    for row in rows:
        sizes[row["filter"]] = sizes.get(row["filter"], 0) + 1
        for name in row["metrics"]:
            key = name if row["filter"] == rows[0]["filter"] else f"{name},{row['filter']}"
            found.setdefault(key, []).append(_number(name, row[name]))
    size = lambda key: sizes.get(key.rpartition(",")[2], sizes[rows[0]["filter"]])
    return {
        name: [float(value) for value in values]
        for name, values in found.items()
        if len(values) == size(name) and None not in values
    }


def _number(name: str, value: Any) -> float | None:
    """A metric of an item; the harness writes the booleans of numpy as words."""
    if name == "bits_per_byte" and isinstance(value, tuple | list):
        likelihood, size = value
        return -likelihood / (size * math.log(2))
    if value in ("True", "False"):
        return float(value == "True")
    try:
        return None if isinstance(value, str) else float(value)
    except (TypeError, ValueError):
        return None


def item_facts(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of the items of one filter: `chance`, `labels` and `questions` of a `TaskResult`."""
    digest = sha256("".join(row["prompt_hash"] for row in items).encode()).hexdigest()
    labels = _labels([row["doc"] for row in items])
    return {"chance": _chance(items), "labels": labels, "questions": digest[:HASH]}


def _chance(items: Sequence[dict[str, Any]]) -> float | None:
    """The mean of 1 / options; None where an item has no two options."""
    # For mutual information every option is asked a second time, without its question.
    times = 2 if "acc_mutual_info" in items[0]["metrics"] else 1
    options = [len(row["resps"]) // times for row in items]
    return sum(1 / count for count in options) / len(options) if min(options) > 1 else None


def _labels(docs: Sequence[Any]) -> dict[str, list[str]]:
    """By field its values, of the fields of documents that put several items into one group."""
    first = docs[0] if isinstance(docs[0], Mapping) else {}
    found = {}
    for name in first:
        values = [doc.get(name) for doc in docs]
        plain = all(isinstance(x, str | int) and not isinstance(x, bool) for x in values)
        texts = [str(value) for value in values] if plain else []
        groups = set(texts)
        if 1 < len(groups) <= len(docs) / 2 and max(map(len, groups)) <= _LONGEST_LABEL:
            found[name] = texts
    return found
