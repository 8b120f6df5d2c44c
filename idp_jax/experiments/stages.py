"""The stages of an experiment up to what is measured: text, compressed models, adapters.

Each stage leaves files in the experiment's folder. The invariant: a stage whose result is there is
not run again, and its result does not depend on how often the experiment was stopped.
"""

import json
from collections.abc import Callable
from pathlib import Path

from idp_jax import formats, training
from idp_jax.compression.job import Job
from idp_jax.config import Compress, ConfigError, Data, Experiment, Train, Variant
from idp_jax.config.experiment import BEST, ORACLE, taught
from idp_jax.config.files import from_dict, to_dict
from idp_jax.data.self_text import sample_documents
from idp_jax.experiments.held_out import check_corpora, held_out_files, write_held_out
from idp_jax.experiments.once import check_unchanged, compress_once
from idp_jax.jobs.files import contents, fingerprint, write_text
from idp_jax.jobs.marker import mark
from idp_jax.jobs.progress import Progress
from idp_jax.models import Decoder
from idp_jax.recover.selection import find_selector

PARTS = ("train", "validation", "test")
_CALIBRATION_BATCH = 16  # windows


def inputs(settings: Experiment) -> dict[str, dict[str, str]]:
    """The fingerprints of what an experiment reads."""
    found = {"model": fingerprint(formats.resolve(settings.model))}
    data = settings.data
    texts = {} if data is None else {"train": data.train, "held-out": data.held_out}
    if data is not None and data.second is not None:
        texts["second"] = data.second
    found |= {f"data.{name}": fingerprint(text) for name, text in texts.items()}
    if settings.task_data is not None:
        found["task-data"] = contents(settings.task_data)
    return found


def needed(settings: Experiment) -> int:
    """Bytes that an experiment takes at least: of text that it samples."""
    sampled = settings.data is None and not (settings.out / "text").is_dir()
    return 3 * settings.train_tokens if sampled else 0


def text_files(settings: Experiment) -> dict[str, Path]:
    """Where the parts of the text are."""
    if settings.data is not None:
        held_out = held_out_files(settings.out)
        return {"validation": held_out["choosing"], "test": held_out["reported"]}
    return {part: settings.out / "text" / f"{part}.jsonl" for part in PARTS}


def training_text(settings: Experiment) -> str:
    """What is calibrated and trained on: a file or a text of the hub."""
    return str(text_files(settings)["train"]) if settings.data is None else settings.data.train


def write_texts(settings: Experiment, model: Callable[[], Decoder], progress: Progress) -> None:
    """Splits the held-out text; without texts, samples all from the uncompressed model."""
    if settings.data is None:
        _sample_texts(settings, model, progress)
    else:
        write_held_out(settings.data, formats.load_tokenizer(settings.model), settings.out)


def _sample_texts(settings: Experiment, model: Callable[[], Decoder], progress: Progress) -> None:
    """Samples text from the uncompressed model, and splits it by documents into its parts."""
    files, kept = text_files(settings), settings.out / "text" / "sampled.jsonl"
    if all(file.is_file() for file in files.values()):
        kept.unlink(missing_ok=True)  # left by a call that was stopped just before this line
        check_unchanged(settings.out / "text")
        return
    tokenizer = formats.load_tokenizer(settings.model)
    length, spare = settings.sequence_length, 2
    held_out = (settings.validation_windows // 2 + spare) * length
    calibration = settings.calibration_windows * length
    train = max(settings.train_tokens, calibration) + spare * length
    with progress.bar("sampling text from the model", "tokens") as update:
        texts = sample_documents(
            model(),
            tokenizer,
            train + 2 * held_out,
            seed=settings.seed,
            progress=update,
            kept=kept,
        )
    wanted = {"test": held_out, "validation": held_out, "train": float("inf")}
    for part, tokens in wanted.items():
        chosen, count = [], 0
        while texts and count < tokens:
            chosen.append(texts.pop())
            count += len(tokenizer(chosen[-1])["input_ids"])
        write_text(files[part], "".join(json.dumps({"text": text}) + "\n" for text in chosen))
    kept.unlink(missing_ok=True)
    mark(settings.out / "text")


def model_of(settings: Experiment, compression: str | None) -> str:
    """The name or folder of a model of the experiment."""
    return settings.model if compression is None else str(_compress(settings, compression).out)


def compressed(settings: Experiment, name: str, progress: Progress) -> None:
    """Compresses the model by one of the recipes."""
    compress_once(_compress(settings, name), progress)


def _compress(settings: Experiment, name: str) -> Compress:
    common = {
        **to_dict(settings.compression),
        "model": settings.model,
        "out": settings.out / "models" / name,
        "calibration": training_text(settings),
        "samples": settings.windows.calibration,
        "sequence_length": settings.windows.length,
        "batch_size": _CALIBRATION_BATCH,
        "seed": settings.seed,
    }
    return from_dict(Compress, common | settings.compressions[name], f"compressions.{name}")


def adapters(settings: Experiment) -> dict[tuple[str | None, str], Variant]:
    """What must be trained, by compression and recipe, each with a variant that asks for it."""
    return {
        (variant.compression, variant.adapter.partition("/")[0]): variant
        for variant in settings.rows
        if variant.adapter is not None
    }


def trained(settings: Experiment, variant: Variant, progress: Progress) -> None:
    """Trains a variant's adapter beside its model."""
    training.train(training_of(settings, variant), progress=progress)


def adapter_of(settings: Experiment, variant: Variant) -> Path | None:
    """The folder of a variant's adapter, or of that part of it which the variant names."""
    if variant.adapter is None:
        return None
    _, _, part = variant.adapter.partition("/")
    return training_of(settings, variant).out / "adapter" / part


def training_of(settings: Experiment, variant: Variant) -> Train:
    """How a variant's adapter is trained.

    Adapters of one recipe and several models lie in folders of their models' names.
    """
    name = str(variant.adapter).partition("/")[0]
    data = Data(
        train=training_text(settings),
        validation=str(text_files(settings)["validation"]),
        validation_windows=settings.windows.choosing,
        sequence_length=settings.windows.length,
    )
    common = {
        "model": model_of(settings, variant.compression),
        "out": settings.out / "adapters" / (variant.compression or "dense") / name,
        "tokens": settings.train_tokens,
        "batch_size": settings.batch_size,
        "data": to_dict(data),
        "evaluate_every": settings.evaluate_every,
        "checkpoint_every": settings.evaluate_every,
        "seed": settings.seed,
    }
    cache = settings.out / "teacher" if settings.cache_teacher else None
    return taught(common | settings.adapters[name], settings.model, f"adapters.{name}", cache)


def check(settings: Experiment) -> None:
    """Refuses recipes and selectors that cannot be used, before anything is done.

    Raises:
        ConfigError: a recipe has a setting that is none, or that is out of range.
        ValueError: there is no such selector.
    """
    if settings.data is not None:
        check_corpora(settings.data)
    jobs = [_compress(settings, name) for name in settings.compressions]
    trainings = {key: training_of(settings, row) for key, row in adapters(settings).items()}
    for variant in settings.rows:
        if variant.selector in (BEST, ORACLE):
            name = str(variant.adapter)
            config = trainings.get((variant.compression, name))
            if config is None or config.method != "idp" or config.pool.training == "joint":
                raise ConfigError(
                    f"variant {variant.name!r}: {variant.selector} is of a pool whose prompts "
                    f"were trained apart, which {name} is not"
                )
        elif variant.selector is not None:
            find_selector(variant.selector)
    for job in jobs:
        Job(job)  # reads configurations alone
