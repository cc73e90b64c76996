"""Run folders. What a job leaves in its folder is that job's: no other overwrites it, and the same job goes on with it.

A job leaves its settings as <job>.yaml beside its products. Settings that do not change its results are not compared.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from absl import logging

from qswin.calib.files import remove_temporaries, sidecar_path, write_atomic
from qswin.calib.histogram_file import HISTOGRAMS
from qswin.calib.lock import lock_folder
from qswin.calib.reading import read_yaml
from qswin.qat.checkpoint import Description, read_description
from qswin.qat.config import settings_of
from qswin.qat.quant.recipe_file import contents
from qswin.qat.schema import RENAMED, Config

PTQ = "ptq.safetensors"
LOG = "log.jsonl"  # of a training


@dataclasses.dataclass(frozen=True)
class Job:
    """What a job writes, and which sections of the config it goes by."""

    products: tuple[str, ...]
    sections: tuple[str, ...]


JOBS = {
    "calibrate": Job((PTQ, HISTOGRAMS), ("model", "data", "recipe", "calibration", "seed")),
    "convert": Job((PTQ, HISTOGRAMS), ("model", "data", "recipe")),
    "train": Job(
        ("last.pt", "float.safetensors", "qat.safetensors"), ("model", "data", "recipe", "train", "init", "seed")
    ),
}
FREE = (  # settings that do not change what a job makes
    "data.root",  # moved data are the same data
    "data.workers",
    "data.skip_unreadable",
    "train.save_minutes",
    "train.log_every",
)


@contextlib.contextmanager
def one_job(folder: Path, main: bool) -> Iterator[None]:
    """Holds a run's folder for one job, and removes what killed jobs left there half written.

    Args:
        main: whether this is the process, of those of the job, that holds it.

    Raises:
        ValueError: another job holds it; its process is named.
        OSError: the folder cannot be made.
    """
    with lock_folder(folder) if main else contextlib.nullcontext(False) as locked:
        if locked:
            remove_temporaries(folder, _written())
        yield


def _written() -> list[str]:
    """The names of all files that jobs write in their folder."""
    products = [product for job in JOBS.values() for product in job.products]
    return [LOG, *(f"{job}.yaml" for job in JOBS), *products, *(sidecar_path(Path(name)).name for name in products)]


class Run:
    """A run's folder, as one job sees it.

    Args:
        start_over: what the job left there before counts for nothing, and goes when the folder is claimed.

    Raises:
        ValueError: the folder holds what another job made, or this job with other settings; the first that differs is
            named.
    """

    def __init__(self, folder: Path, job: str, settings: dict[str, Any], start_over: bool = False) -> None:
        self.folder, self.job, self.settings, self.start_over = folder, job, settings, start_over
        self._check_others()
        if self._products() and not start_over:
            self._check_settings()

    @classmethod
    def of(cls, config: Config, job: str) -> "Run":
        """The folder that a config names. Raises ValueError as the class does."""
        settings = settings_of(config)
        kept = {key: settings[key] for key in JOBS[job].sections}
        return cls(Path(config.run), job, kept | {"recipe": contents(config.recipe)}, config.resume == "never")

    def _products(self) -> list[Path]:
        """What is there of that which the job makes."""
        return [file for product in JOBS[self.job].products if (file := self.folder / product).exists()]

    def _settings_file(self, job: str) -> Path:
        return self.folder / f"{job}.yaml"

    def _rivals(self) -> list[str]:
        """Other jobs that make a file of the same name, and have left their settings."""
        mine = set(JOBS[self.job].products)
        found = [job for job in JOBS if job != self.job and mine & set(JOBS[job].products)]
        return [job for job in found if self._settings_file(job).is_file()]

    def _check_others(self) -> None:
        if not (products := self._products()):
            return
        name = products[0].name
        if rivals := self._rivals():
            raise ValueError(
                f"{self.folder}: its {name} was made by another job, {rivals[0]}; choose another run=FOLDER"
            )
        if not self._settings_file(self.job).is_file():
            raise ValueError(f"{self.folder}: its {name} was not made here by {self.job}; choose another run=FOLDER")

    def _check_settings(self) -> None:
        file = self._settings_file(self.job)
        saved = _read(file)
        before, now = _compared(saved, self.job), _compared(self.settings, self.job)
        if before.get("train.epochs", 0) < now.get("train.epochs", 0):
            before["train.epochs"] = now["train.epochs"]  # more of the same is the same job
        if (found := first_difference(before, now)) is not None:
            key, old, new = found
            where = f"{file.name} has {key}={old}, not {new}"
            raise ValueError(
                f"{self.folder}: used by another job ({where}); choose another run=FOLDER, or resume=never"
            )
        old_root, root = saved["data"].get("root"), self.settings["data"]["root"]
        if old_root != root:
            logging.warning("%s: data.root was %s; %s is taken for the same data", file, old_root, root)

    def finished(self, product: str) -> Description | None:
        """The sidecar of a checkpoint that the job has already made, if that is whole."""
        try:
            return None if self.start_over else read_description(self.folder / product)
        except (ValueError, FileNotFoundError):
            return None

    def claim(self) -> None:
        """Makes the folder the job's: leaves its settings there, and removes what it left before if it starts over.

        Of the processes of a job, one claims the folder.
        """
        for file in self._products() if self.start_over else ():
            sidecar_path(file).unlink(missing_ok=True)
            file.unlink(missing_ok=True)
        for job in self._rivals():
            self._settings_file(job).unlink(missing_ok=True)  # of a job that left nothing else
        write_atomic(self._settings_file(self.job), yaml.safe_dump(self.settings, sort_keys=False).encode())


def _read(file: Path) -> dict[str, Any]:
    settings = read_yaml(file)
    if not isinstance(settings, dict) or not isinstance(settings.get("data"), dict):
        raise ValueError(f"{file}: not the settings of a job; choose another run=FOLDER")
    return settings


def _compared(settings: dict[str, Any], job: str) -> dict[str, Any]:
    """What decides a job's results, flat and under today's names. Keys that the schema gained since are at defaults."""
    flat = {RENAMED.get(key, key): value for key, value in flatten(settings).items()}
    everything = flatten(settings_of(Config())) | flat
    return {
        key: value for key, value in everything.items() if key not in FREE and key.split(".")[0] in JOBS[job].sections
    }


def first_difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """(key, value before, value now) of the first key, by name, at which two flat mappings differ."""
    keys = (key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key))
    return next(((key, before.get(key), now.get(key)) for key in keys), None)


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """{"a.b.0.c": 1} of {"a": {"b": [{"c": 1}]}}. A list of anything but mappings is one value."""
    if isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value):
        value = {str(index): entry for index, entry in enumerate(value)}
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= flatten(inner, f"{prefix}.{key}".lstrip("."))
    return flat
