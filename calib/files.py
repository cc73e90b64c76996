"""Files that are whole or not there, and JSON that says of what kind it is.

A checkpoint, engine, package or calibration cache has a sidecar: `<file>.json` beside it, which describes the file and
holds its checksum. What a command writes for `--json` is a result. Both have a `"kind"`, and neither is written over a
file of another kind.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

# Distributions whose versions a result records, where they are installed.
RECORDED = ("qswin", "torch", "timm", "onnx", "onnxruntime", "tensorrt", "tensorrt_rtx_cu13_bindings")


def write_atomic(path: str | Path, data: bytes) -> None:
    """Writes `data` to a temporary file beside `path`, syncs it and renames it over `path`.

    Raises:
        OSError: nothing could be written (a full disk, say); `path` is as it was before.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise OSError(
            f"{path}: not saved ({error.strerror or error}); free some space or choose another folder"
        ) from error
    except BaseException:
        os.unlink(temporary)
        raise


def write_json(path: str | Path, value: Any) -> None:
    """Writes `value` as indented JSON, atomically. Raises OSError as `write_atomic` does."""
    write_atomic(path, (json.dumps(value, indent=2) + "\n").encode())


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def sidecar_path(path: Path) -> Path:
    """`ptq.safetensors.json` of `ptq.safetensors`: files that differ only in suffix have their own sidecars."""
    return path.with_name(path.name + ".json")


def write_with_sidecar(path: str | Path, data: bytes, kind: str, values: dict[str, Any]) -> None:
    """Writes a file and its sidecar, each atomically; the sidecar, with the checksum of the file, last.

    Args:
        kind: what the file is: "checkpoint", "engine", "package" or "calibration cache".
        values: what the sidecar says of it.

    Raises:
        ValueError: the sidecar's name belongs to a file of another kind.
        OSError: nothing could be written.
    """
    path = Path(path)
    check_replaceable(sidecar_path(path), kind)
    write_atomic(path, data)
    write_json(sidecar_path(path), {"kind": kind, **values, "sha256": hashlib.sha256(data).hexdigest()})


def read_sidecar(
    path: Path, kind: str, keys: Collection[str], remedy: str, data: bytes | None = None
) -> dict[str, Any]:
    """The sidecar of a file. One under the name that qswin gave it before 0.2, `ptq.json`, is read too.

    Args:
        kind: of the file, as it was written with.
        keys: that the sidecar must have.
        remedy: what to do about a sidecar that is missing or wrong; the end of the message.
        data: the file's content, where it has been read: what is used is then what was checked.

    Raises:
        FileNotFoundError: the file or its sidecar is missing.
        ValueError: the sidecar is malformed, of another kind or of another file, or the file has changed since.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such {kind}")
    sidecar = next((file for file in (sidecar_path(path), path.with_suffix(".json")) if file.is_file()), None)
    if sidecar is None:
        raise FileNotFoundError(f"{path}: its sidecar {sidecar_path(path).name} is missing; {remedy}")
    values = read_json(sidecar)
    if values.get("kind", kind) != kind:
        raise ValueError(f"{sidecar}: its kind is {values['kind']!r}, not {kind!r}; {remedy}")
    missing = [key for key in (*keys, "sha256") if key not in values]
    if missing:
        raise ValueError(f"{sidecar}: not the sidecar of a {kind} ({missing[0]!r} is missing); {remedy}")
    if (sha256(path) if data is None else hashlib.sha256(data).hexdigest()) != values["sha256"]:
        raise ValueError(f"{path}: truncated or changed since its sidecar was written; {remedy}")
    return values


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises FileNotFoundError, and ValueError where the file holds anything else."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        values = json.loads(path.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON, or cut off; delete it, or make it again") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: not a JSON object; delete it, or make it again")
    return values


def write_result(path: str | Path, kind: str, values: dict[str, Any]) -> None:
    """Writes what a command found: its kind, the values, the versions of the libraries and the command line.

    Args:
        path: "-" is standard output.
        kind: such as "evaluation"; `qswin report` knows a result by it.

    Raises:
        ValueError: a file that is not a result of this kind stands there.
        OSError: nothing could be written.
    """
    result = {"kind": kind, **values, "versions": versions(), "command": sys.argv}
    if str(path) == "-":
        print(json.dumps(result, indent=2))
        return
    check_replaceable(Path(path), kind)
    write_json(path, result)


def check_replaceable(path: Path, kind: str) -> None:
    """Raises ValueError unless a JSON file may be written: nothing is there, or JSON of the same kind."""
    if not path.exists():
        return
    try:
        found = read_json(path).get("kind")
    except (ValueError, FileNotFoundError):
        found = None
    if found != kind:
        what = "a file of another kind" if found is None else f"the JSON of a {found}"
        raise ValueError(f"{path}: is {what}, which would be lost; choose another name, or delete it")


def check_suffix(option: str, path: Path, suffixes: Collection[str]) -> None:
    """Raises ValueError unless an output's name ends as files of its kind do, so that it replaces no other kind."""
    if path.suffix not in suffixes:
        raise ValueError(f"{option} {path}: the name must end in {' or '.join(suffixes)}")


def versions() -> dict[str, str]:
    """Versions of Python and of the installed libraries that results depend on."""
    installed = {name: version for name in RECORDED if (version := version_of(name))}
    return {"python": platform.python_version(), **installed}


def version_of(distribution: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
