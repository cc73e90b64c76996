"""Backends: each opens, times, lists and builds one kind of model file. Files are told apart by suffix, here alone.

A module of qat/backends that has a BACKEND is found by itself. Code outside the repository calls
`register` before it runs a command. Importing a backend imports neither torch nor TensorRT.
"""

import dataclasses
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from qswin.calib.files import check_replaceable, check_suffix, make_folder_of, sidecar_path, write_with_sidecar
from qswin.models.discovery import offers
from qswin.qat import backends as package
from qswin.qat.backends.findings import Finding
from qswin.trt.engines.options import parse_profile
from qswin.trt.evaluation.evaluate import Predictor
from qswin.trt.evaluation.timing import Row, Subject, TimingOptions, time_batches


@dataclasses.dataclass(frozen=True)
class OpenOptions:
    """How a model file is opened; a backend takes of it what concerns it.

    Attributes:
        threads: compute threads of ONNX Runtime; 0 for all cores.
        device: of a checkpoint: auto, cpu, cuda, ...
        config: the YAML file that describes bare weights, which have no sidecar.
        overrides: settings over the config's, "KEY=VALUE".
        timeout: seconds that a run in ONNX Runtime may take; None for any number.
    """

    threads: int = 0
    device: str = "auto"
    config: str | None = None
    overrides: tuple[str, ...] = ()
    timeout: float | None = None


class Listing(NamedTuple):
    """What a model file consists of: `kind` is "layers" or "quantizers", `rows` are for JSON and `table` for people."""

    kind: str
    rows: list[dict[str, Any]]
    table: str


class Backend(ABC):
    """What runs one kind of model file.

    Attributes:
        name: one word, by which backends are sorted.
        suffixes: of its files.
        targets: what `qswin build --target` calls what it builds; empty if it builds nothing.
        sources: of a backend with targets: {flag that names what it builds from, onnx, checkpoint or bundle: its
            options, a frozen dataclass with `target` and a field for each flag that goes with it}.
        kind: of a backend with targets: what the sidecar of a built file says it is.
    """

    name: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...]]
    targets: ClassVar[tuple[str, ...]] = ()
    sources: ClassVar[Mapping[str, Callable[..., Any]]]
    kind: ClassVar[str]

    def takes(self, path: Path) -> bool:
        """Whether a path is one of its model files, by its name."""
        return path.suffix in self.suffixes

    @abstractmethod
    def open(self, path: Path, options: OpenOptions) -> Predictor:
        """A file, ready to run.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: the file is damaged, or does not run on this machine.
        """

    @abstractmethod
    def subjects(self, path: Path, opening: OpenOptions, timing: TimingOptions) -> Iterator[Subject]:
        """What is timed of a file, one after the other. Raises as `open` does."""

    @abstractmethod
    def findings(self) -> list[Finding]:
        """What `qswin doctor` says of the libraries that it needs. It must not fail where they are missing."""

    def listing(self, path: Path, time: bool) -> Listing:
        """What a file consists of. Raises ValueError where that is not known, or cannot be timed.

        Args:
            time: measure each layer.
        """
        raise ValueError(
            f"{path}: what it consists of is not known; qswin inspect lists the file that it was built from"
        )

    def activations(
        self, path: Path, reference: Path, images: np.ndarray, opening: OpenOptions
    ) -> dict[str, np.ndarray]:
        """{tensor of a reference ONNX file: its values for images (N, 3, H, W) in a file of the same network}.

        Raises:
            ValueError: the two are not of one network, or the file does not give its activations out.
        """
        raise ValueError(f"{path}: --layers is for ONNX files and engines")

    def parse_batch_sizes(self, text: str) -> tuple[int, ...]:
        """What --batch-sizes says to its build. Raises ValueError for anything else than batches."""
        return parse_profile(text)

    def build(self, source: Path, output: Path, options: Any) -> tuple[bytes, dict[str, Any]]:
        """Builds the content of `output` from `source`, and what its sidecar says of it; writes neither.

        Args:
            options: of the type that `sources` has for it.
        """
        raise NotImplementedError(f"{self.name} builds nothing")


@functools.cache
def _known() -> dict[str, Backend]:
    """{name: backend}, at first those that the modules of qat/backends offer as BACKEND."""
    return {backend.name: backend for backend in offers(package, "BACKEND")}


def register(backend: Backend) -> None:
    """Adds a backend. Raises ValueError where another one has its name, a suffix or a target of it."""
    for other in _known().values():
        shared = {other.name, *other.suffixes, *other.targets} & {backend.name, *backend.suffixes, *backend.targets}
        if shared:
            raise ValueError(f"backend {backend.name}: {', '.join(sorted(shared))} belongs to backend {other.name}")
    _known()[backend.name] = backend


def backends() -> list[Backend]:
    """All backends, sorted by name."""
    return [backend for _, backend in sorted(_known().items())]


def backend_of(path: Path) -> Backend:
    """The backend that runs a file. Raises ValueError, with all suffixes, for a file of another kind."""
    for backend in backends():
        if backend.takes(path):
            return backend
    known = ", ".join(suffix for backend in backends() for suffix in backend.suffixes)
    raise ValueError(f"{path}: not a model file that qswin knows; its name must end in one of {known}")


def open_predictor(path: Path, options: OpenOptions = OpenOptions()) -> Predictor:  # noqa: B008
    """A model file of any kind, ready to run. Raises as `Backend.open` and `backend_of` do."""
    return backend_of(path).open(path, options)


def time_model(path: Path, batch_sizes: Sequence[int], opening: OpenOptions, timing: TimingOptions) -> Iterator[Row]:
    """A row for each form of a model file, batch and way to run it. Raises as `Backend.open` and `backend_of` do."""
    for subject in backend_of(path).subjects(path, opening, timing):
        yield from time_batches(subject, batch_sizes, timing)


def build_targets() -> list[str]:
    """What `qswin build --target` may be."""
    return [target for backend in backends() for target in backend.targets]


def builder(target: str) -> Backend:
    """The backend that builds for a target."""
    return next(backend for backend in backends() if target in backend.targets)


def choose_source(backend: Backend, target: str, given: Collection[str]) -> str:
    """The flag that names what is built from. Raises ValueError where it, or a flag, is not for the target."""
    taken = {
        flag: {flag, *(field.name for field in dataclasses.fields(options))}  # type: ignore[arg-type]
        for flag, options in backend.sources.items()
    }
    check_flags(given, set().union(*taken.values()), f"--target {target}")
    found = [flag for flag in backend.sources if flag in given]
    if not found:
        sources = " or ".join(f"--{flag} FILE" for flag in backend.sources)
        raise ValueError(f"--target {target} builds from {sources}, which is not given")
    check_flags(given, taken[found[0]], f"--target {target} with --{found[0]}")
    return found[0]


def check_flags(given: Collection[str], taken: Collection[str], what: str) -> None:
    """Raises ValueError for a flag that is not among those taken."""
    if foreign := [name for name in given if name not in taken]:
        raise ValueError(f"--{foreign[0].replace('_', '-')} is not for {what}")


def build(target: str, output: Path, given: dict[str, Any]) -> dict[str, Any]:
    """Builds a model file and writes it with its sidecar.

    Args:
        given: {flag of `qswin build`, as in its backend's options: its value}, of the flags that were given.

    Returns:
        What the sidecar says of it.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a flag is not for this target or is missing, `output` is of another kind, or it cannot be built.
    """
    backend = builder(target)
    source = choose_source(backend, target, given)
    options = backend.sources[source](target=target, **{key: given[key] for key in given if key != source})
    check_suffix("--engine", output, backend.suffixes)
    check_replaceable(sidecar_path(output), backend.kind)
    make_folder_of(output)
    data, values = backend.build(given[source], output, options)
    write_with_sidecar(output, data, backend.kind, values)
    return {**values, "bytes": len(data)}
