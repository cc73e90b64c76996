"""A folder to deploy, written whole or not at all."""

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from qswin.calib.files import NotSaved, make_folder_of, sidecar_path, version_of
from qswin.trt.package.artefacts import BUNDLE, ONNX, Artefact, find_artefacts
from qswin.trt.package.readme import readme
from qswin.trt.package.triton import is_served, write_repository

TEMPLATES = Path(__file__).with_name("templates")
PINNED = ("numpy", "pillow", "onnxruntime")


def write_package(run: Path, out: Path, only: Collection[str] = (), triton: bool = False) -> list[Artefact]:
    """Writes the folder `out`: model files of a run and all that running them takes.

    Args:
        only: the names of the files that are wanted; none stands for all.
        triton: with a model repository of the Triton Inference Server, `out`/models.

    Returns:
        The files that are in it.

    Raises:
        FileNotFoundError: there is no run, or a file of it lacks its sidecar.
        ValueError: `out` is not empty, there is nothing to package, a file is damaged or no classifier, the files are
            not of one model, or Triton serves none.
        NotSaved: it could not be written; nothing is left of it.
    """
    check_free(out)
    artefacts = find_artefacts(run, only)
    served = [artefact for artefact in artefacts if is_served(artefact)] if triton else []
    if triton and not served:
        raise ValueError(f"{run}: Triton serves ONNX files, engines of TensorRT and packages, and there is none")
    text = readme(run, artefacts, triton)
    with new_folder(out) as folder:
        write_files(folder, artefacts)
        (folder / "README.md").write_text(text, "utf-8")
        if served:
            write_repository(folder / "models", served, TEMPLATES)
            write_template(folder, "Dockerfile.triton")
    return artefacts


def check_free(out: Path) -> None:
    """Raises ValueError unless nothing is at `out`, or an empty folder."""
    if out.is_symlink() or (out.exists() and not (out.is_dir() and not any(out.iterdir()))):
        raise ValueError(f"--out {out}: is there already, and not an empty folder; choose another name, or delete it")


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` that gets its name at the end; of an error nothing is left. Raises NotSaved."""
    make_folder_of(out)
    staging = out.with_name(f".{out.name}.{secrets.token_hex(4)}")
    try:
        staging.mkdir()
        yield staging
        os.rename(staging, out)
    except OSError as error:
        raise NotSaved(f"{out}: not saved ({error.strerror or error}); choose another name or folder") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_files(folder: Path, artefacts: Sequence[Artefact]) -> None:
    """All but the README and the model repository."""
    first = artefacts[0]
    how = {"kind": "preprocessing", "channels": "RGB", **first.preprocessing.to_dict()}
    write_values(folder / "preprocessing.json", how)
    (folder / "labels.txt").write_text("\n".join(first.labels) + "\n", "utf-8")
    for name in ("client.py", "preprocess.py"):
        shutil.copyfile(TEMPLATES / f"{name}.in", folder / name)
    for artefact in artefacts:
        shutil.copyfile(artefact.path, folder / artefact.path.name)
        if artefact.sidecar is not None:
            write_values(sidecar_path(folder / artefact.path.name), artefact.sidecar)
    if any(artefact.suffix == ONNX for artefact in artefacts):
        write_template(folder, "Dockerfile")
    if bundle := next((artefact.path.name for artefact in artefacts if artefact.suffix == BUNDLE), None):
        for name in ("main.cpp", "CMakeLists.txt"):
            shutil.copyfile(TEMPLATES / name, folder / name)
        write_template(folder, "Dockerfile.bundle", bundle=bundle)


def write_values(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", "utf-8")


def write_template(folder: Path, name: str, **values: str) -> None:
    """A file of the templates with {name} replaced by values, {numpy} and its like by the versions here.

    A distribution that is not here under its own name, such as onnxruntime beside onnxruntime-gpu, is not pinned.
    """
    text = (TEMPLATES / name).read_text()
    for each in PINNED:
        version = version_of(each)
        text = text.replace(f"=={{{each}}}", f"=={version}" if version else "")
    for key, value in values.items():
        text = text.replace(f"{{{key}}}", value)
    (folder / name).write_text(text)
