"""The model files in a run's folder, and what running one takes: read from its metadata or its sidecar."""

import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import Any

from qswin.calib.data.images import Preprocessing
from qswin.calib.files import read_sidecar
from qswin.calib.validation import Count, Name, Task, take
from qswin.trt.engines.engine import KIND as ENGINE
from qswin.trt.engines.engine import SUFFIXES as ENGINES
from qswin.trt.graphs.files import check_interface, metadata_values, properties, read_onnx

ONNX, BUNDLE, PACKAGE = ".onnx", ".qsb", ".pt2"
KINDS = {**dict.fromkeys(ENGINES, ENGINE), BUNDLE: "bundle", PACKAGE: "package"}  # of what has a sidecar
REMEDY = "build it again with qswin build"


@dataclasses.dataclass(frozen=True)
class Described:
    """What metadata and sidecars say of every model.

    Attributes:
        model: its name and settings, `num_classes` among them.
    """

    preprocessing: Preprocessing
    task: Task
    classes: list[str] | None
    model: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Built:
    """What a sidecar says of what was built.

    Attributes:
        target: as `qswin build --target` calls it; `version` is the library's.
        capability: the GPU's, "9.0", if the file is for one alone.
        profile: the smallest, the usual and the largest batch.
        batch_sizes: that it takes, if those alone.
        plugin: the library with the engine's layers, if TensorRT lacks them.
        architectures: of a bundle.
    """

    target: str
    version: str
    engine_precision: Name
    gpu: str | None = None
    capability: str | None = None
    profile: tuple[Count, Count, Count] | None = None
    batch_sizes: tuple[Count, ...] | None = None
    plugin: Name | None = None
    architectures: tuple[Count, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Artefact:
    """A model file.

    Attributes:
        labels: a name for each class.
        batch: the one batch size that it takes; None if there are several.
        sidecar: what its sidecar says; None of an ONNX file, which has none.
        built: the part of it that is used here.
    """

    path: Path
    preprocessing: Preprocessing
    labels: tuple[str, ...]
    batch: int | None
    sidecar: dict[str, Any] | None = None
    built: Built | None = None

    @property
    def suffix(self) -> str:
        return self.path.suffix


def find_artefacts(run: Path, only: Collection[str] = ()) -> list[Artefact]:
    """The model files of a run's folder, in order.

    Args:
        only: the names of those that are wanted; none stands for all.

    Raises:
        FileNotFoundError: there is no such folder, no such file in it, or a file lacks its sidecar.
        ValueError: there is no model file, one is damaged or no classifier, or they are not of one model.
    """
    if not run.is_dir():
        raise FileNotFoundError(f"{run}: no such folder; give a run's folder")
    paths = sorted(path for path in run.iterdir() if path.suffix in (ONNX, *KINDS) and path.is_file())
    if missing := set(only) - {path.name for path in paths}:
        raise FileNotFoundError(f"{run / min(missing)}: no such model file; see {run} for what there is")
    if not paths:
        kinds = ", ".join((ONNX, *KINDS))
        raise ValueError(f"{run}: nothing to package, no file that ends in {kinds}; run qswin export or qswin build")
    found = [read_artefact(path) for path in paths if not only or path.name in only]
    check_alike(found)
    return found


def read_artefact(path: Path) -> Artefact:
    """A model file and what is known of it. Raises as `find_artefacts` does."""
    return _from_metadata(path) if path.suffix == ONNX else _from_sidecar(path)


def _from_metadata(path: Path) -> Artefact:
    model = read_onnx(path)
    described = take(metadata_values(path, properties(model)), Described, f"{path}: its qswin metadata")
    check_classifier(path, described)
    check_interface(path, model)
    batch, logits = (value.type.tensor_type.shape.dim for value in (model.graph.input[0], model.graph.output[0]))
    labels = labels_of(path, described, logits[1].dim_value)
    return Artefact(path, described.preprocessing, labels, batch[0].dim_value or None)


def _from_sidecar(path: Path) -> Artefact:
    keys = [field.name for field in dataclasses.fields(Built) if field.default is dataclasses.MISSING]
    values = read_sidecar(path, KINDS[path.suffix], (*keys, "preprocessing", "task", "classes"), REMEDY)
    where = f"{path}: its sidecar"
    described, built = take(values, Described, where, REMEDY), take(values, Built, where, REMEDY)
    check_classifier(path, described)
    labels = labels_of(path, described, described.model.get("num_classes"))
    profile = built.profile or built.batch_sizes or ()
    batch = profile[0] if len(set(profile)) == 1 else None
    return Artefact(path, described.preprocessing, labels, batch, values, built)


def check_classifier(path: Path, described: Described) -> None:
    if described.task != "classification":
        raise ValueError(f"{path}: a {described.task} model; qswin package is for classifiers")


def labels_of(path: Path, described: Described, count: Any) -> tuple[str, ...]:
    """The names of the classes, or their numbers where they have none. Raises ValueError where they fit no line."""
    if described.classes is None:
        if not isinstance(count, int) or count < 1:
            raise ValueError(f"{path}: does not say how many classes it has; {REMEDY}")
        return tuple(map(str, range(count)))
    if broken := [name for name in described.classes if len(name.splitlines()) != 1]:
        raise ValueError(f"{path}: the class {broken[0]!r} is not one line, as labels.txt needs; rename it")
    return tuple(described.classes)


def check_alike(found: list[Artefact]) -> None:
    """Raises ValueError unless all take the same images and tell the same classes."""
    first = found[0]
    for other in found[1:]:
        for what in ("preprocessing", "labels"):
            if getattr(other, what) != getattr(first, what):
                both = f"{first.path.name} and {other.path.name} differ in their {what}"
                raise ValueError(f"{first.path.parent}: {both}; choose the files of one model with --only")
