"""Results in the harness's own files, for its own readers: written by its own writer.

`DIR/MODEL/results_TIME.json` and `DIR/MODEL/samples_TASK_TIME.jsonl`, of every item the options'
log-probabilities or the text, the answer, the metrics, and as `prompts` what a pool chose for it.
The invariant: the files come to stand there together, when all of them are whole.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lm_eval.loggers import EvaluationTracker

from idp_jax.jobs.files import naming


class HarnessFiles:
    """The files of one evaluation; `tracker` is what `lm_eval.simple_evaluate` is given."""

    def __init__(self, folder: str | Path, model_args: dict[str, Any]):
        """Remembers where the files go.

        Args:
            folder: made with the first file.
            model_args: what is said of the model; the files' folder is named by its "pretrained".
        """
        self.folder = Path(folder)
        self.model_args = model_args
        self._partial = self.folder / ".partial"
        self.tracker = EvaluationTracker(output_path=str(self._partial))

    def write(
        self, found: dict[str, Any], prompts: Mapping[str, Mapping[int, list[int]]]
    ) -> list[Path]:
        """Writes the files.

        Args:
            found: what `simple_evaluate` returned.
            prompts: by task and number of the item, see `HarnessLM.choices`.

        Raises:
            OSError: a file cannot be written.
        """
        samples = {task: _rows(rows, prompts.get(task)) for task, rows in found["samples"].items()}
        results = {key: value for key, value in found.items() if key != "samples"}
        shutil.rmtree(self._partial, ignore_errors=True)
        with naming(self.folder):
            self._partial.mkdir(parents=True)
            try:
                self.tracker.save_results_aggregated(results=results, samples=samples)
                for task, rows in samples.items():
                    self.tracker.save_results_samples(task_name=task, samples=rows)  # type: ignore
                self._check(samples)
                return self._moved()
            finally:
                shutil.rmtree(self._partial, ignore_errors=True)

    def _check(self, samples: dict[str, list[dict]]) -> None:
        """Refuses files that are not whole: of an error the harness's writer logs a warning."""
        found = [file.read_bytes() for file in self._partial.glob("*/samples_*.jsonl")]
        whole = sum(text.count(b"\n") for text in found) == sum(map(len, samples.values()))
        results = [file.read_bytes() for file in self._partial.glob("*/results_*.json")]
        if not whole or len(results) != 1 or not results[0].endswith(b"}"):
            raise OSError(f"{self.folder}: the files of samples cannot be written; check the disk")

    def _moved(self) -> list[Path]:
        files = sorted(self._partial.glob("*/*"))
        places = [self.folder / file.relative_to(self._partial) for file in files]
        for file, place in zip(files, places, strict=True):
            place.parent.mkdir(parents=True, exist_ok=True)
            file.replace(place)
        return places


def _rows(rows: list[dict], prompts: Mapping[int, list[int]] | None) -> list[dict]:
    """Copies, since the writer changes what it is given; with the prompts of a pool."""
    known = lambda row: {} if prompts is None else {"prompts": prompts.get(row["doc_id"], [])}
    return [{**row, **known(row)} for row in rows]
