"""Measures the models of a sweep, each loaded once, and only if something of it is missing."""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from idp_jax import formats
from idp_jax.config import Measurement, Sweep
from idp_jax.config.choices import Role
from idp_jax.config.files import to_dict
from idp_jax.evaluation.job import measure, read_inputs
from idp_jax.evaluation.results import VariantResult
from idp_jax.experiments.held_out import held_out_files
from idp_jax.experiments.once import measure_once
from idp_jax.experiments.sweep_rows import Measured
from idp_jax.formats.adapters import read_adapter
from idp_jax.jobs.files import contents, fingerprint
from idp_jax.jobs.progress import Progress
from idp_jax.recover import Repaired
from idp_jax.recover.methods import parameter_count

Row = tuple[str, Role, Path | None]  # name, role and the run of the adapter


class Measurements:
    """Scores models on the reported text, the second text and the tasks.

    Attributes:
        tasks: the names that were asked for.
        variants: all that was measured so far.
    """

    def __init__(
        self, settings: Sweep, tokenizer: Any, progress: Progress, say: Callable[[str], None]
    ):
        self.settings, self.tokenizer = settings, tokenizer
        self.progress, self.say = progress, say
        self.variants: list[VariantResult] = []
        reported = held_out_files(settings.out)["reported"]
        self._asked = [self._settings(tasks=settings.tasks, perplexity=reported)]
        if settings.data.second is not None:
            self._asked.append(self._settings(perplexity=settings.data.second))
        self.tasks = self._asked[0].task_names
        self._inputs = cache(lambda: [read_inputs(asked, tokenizer) for asked in self._asked])
        self._texts = [fingerprint(str(asked.perplexity)) for asked in self._asked]

    @staticmethod
    def of_tasks(settings: Sweep) -> Measurement:
        """The tasks alone, which can be read before there is any text."""
        found = Measurement(
            tasks=settings.tasks,
            task_data=settings.task_data,
            limit=settings.items,
            latency=True,  # no tasks at all may be asked for
        )
        return found

    def _settings(self, **chosen: Any) -> Measurement:
        return Measurement(
            task_data=self.settings.task_data,
            limit=self.settings.items,
            sequence_length=self.settings.data.sequence_length,
            windows=self.settings.data.reported_windows,
            seed=self.settings.seed,
            **chosen,
        )

    def all_of(self, model: str, rows: Sequence[Row]) -> list[Measured]:
        """One model, bare and repaired.

        Args:
            rows: what is measured of it.
        """
        load = cache(
            lambda: formats.load_model(
                model, weights="auto", progress=self.progress.tracker("loading")
            )
        )
        known = fingerprint(formats.resolve(model))
        return [self._one(model, known, load, *row) for row in rows]

    def _one(
        self, model: str, known: dict, load: Callable, name: str, role: Role, run: Path | None
    ) -> Measured:
        folder = None if run is None else run / "adapter"

        def measure_it() -> list[VariantResult]:
            self.say(f"evaluation: {name}")
            repaired, added = Repaired.of(load()), 0
            if folder is not None:
                adapter = read_adapter(repaired.decoder, folder)
                repaired, added = adapter.repair(repaired.decoder), parameter_count(adapter)
            return [
                measure(
                    repaired,
                    self.tokenizer,
                    asked,
                    inputs=inputs,
                    progress=self.progress,
                    name=name if not number else f"{name}, second text",
                    role=role,
                    model=model,
                    adapter=None if folder is None else str(folder),
                    extra_parameters=added,
                )
                for number, (asked, inputs) in enumerate(
                    zip(self._asked, self._inputs(), strict=True)
                )
            ]

        read = {"model": known, "adapter": {} if folder is None else contents(folder)}
        asked = {
            "measurements": [to_dict(each) for each in self._asked],
            "inputs": read | {f"text {n}": found for n, found in enumerate(self._texts)},
        }
        place = self.settings.out / "evaluation"
        # As finals/COMPRESSION/RECIPE/seed-S and controls/RECIPE/lr-RATE.
        file = place / (name if run is None else run.relative_to(self.settings.out))
        found = measure_once(file.with_name(f"{file.name}.json"), asked, measure_it)
        self.variants += found
        return Measured(found[0], found[1] if len(found) > 1 else None)
