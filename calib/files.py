"""Files that are whole or not there, and JSON that says of what kind it is.

A checkpoint, engine, package or calibration cache has a sidecar: `<file>.json` beside it, which describes the file and
holds its checksum. What a command writes for `--json` is a result. Both have a `"kind"`, and neither is written over a
file of another kind.
"""

import contextlib
import errno
import glob
import hashlib
import importlib.metadata
import json
import os
import platform
import secrets
import stat
import sys
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from qswin.calib.reading import open_regular, read_json

# Distributions whose versions a result records, where they are installed.
RECORDED = ("qswin", "torch", "timm", "onnx", "onnxruntime", "tensorrt", "tensorrt_rtx_cu13_bindings")
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # of a disk, a quota, a limit of the process

_saved: dict[Path, None] = {}  # by this process, in order; a job writes the same few again and again


class NotSaved(OSError):
    """A file could not be written; see `saved_files` for those that were before."""


def saved_files() -> list[Path]:
    """The files that this process has written whole, and that are there; each once, in order."""
    return [path for path in _saved if path.is_file()]


def forget_saved() -> None:
    """Empties the list of `saved_files`: a command begins."""
    _saved.clear()


def write_atomic(path: str | Path, data: bytes) -> None:
    """Writes `data` to a temporary file, syncs it, and renames it over what stands at `path`.

    A link is followed: its target is replaced. A file that is replaced gives its permissions to the new one; a new file
    gets those that the umask leaves. What is not a regular file (/dev/null, a FIFO), or is this process's own standard
    output, is written to as it stands.

    Raises:
        NotSaved: nothing could be written (a full disk, say); a regular file is as it was before.
    """
    path = Path(path)
    with _saving(path):
        status = _status(path)
        if status is None or _is_replaced(status):
            _replace(Path(os.path.realpath(path)), status, data)
        else:
            _append(path, status, data)
    _saved[path] = None


def make_folder_of(path: Path) -> None:
    """Makes the folder that a file is to be written in. Raises NotSaved where it cannot."""
    with _saving(path):
        path.parent.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def _saving(path: Path) -> Iterator[None]:
    """Turns an OSError into NotSaved, which names the file."""
    try:
        yield
    except OSError as error:
        remedy = "free some space, or choose" if error.errno in FULL else "choose"
        reason = error.strerror or error
        raise NotSaved(f"{path}: not saved ({reason}); {remedy} another name or folder") from error


def _status(path: Path) -> os.stat_result | None:
    """What stands at a path, links followed; None where nothing does.

    Raises:
        OSError: a circle of links, a file in the place of a folder, or a folder that may not be looked into.
    """
    try:
        return path.stat()
    except FileNotFoundError:
        return None


def _is_replaced(status: os.stat_result) -> bool:
    """Whether what stands there is a regular file, and not where this process's standard output goes."""
    return stat.S_ISREG(status.st_mode) and _standard_stream(status) is None


def _standard_stream(status: os.stat_result) -> int | None:
    """The descriptor of standard output or standard error, where it is open and goes to this file."""
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):
            if os.path.samestat(status, os.fstat(descriptor)):
                return descriptor
    return None


def _append(path: Path, status: os.stat_result, data: bytes) -> None:
    """Writes to a device, or after what was printed to standard output."""
    stream = _standard_stream(status)
    if stream is not None and sys.stdout is not None:
        sys.stdout.flush()
    with open(path if stream is None else stream, "ab", closefd=stream is None) as file:
        file.write(data)


def _replace(target: Path, status: os.stat_result | None, data: bytes) -> None:
    """Writes a temporary file beside `target` and renames it over it. `status` is that of the file that goes."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    handle = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        with os.fdopen(handle, "wb") as file:
            if status is not None:
                with contextlib.suppress(PermissionError):  # some file systems have no permissions
                    os.fchmod(handle, stat.S_IMODE(status.st_mode))
            file.write(data)
            file.flush()
            os.fsync(handle)
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(target.parent)


def _sync_folder(folder: Path) -> None:
    """Makes a new name in a folder last through a power cut, on file systems that can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_temporaries(folder: Path, names: Iterable[str]) -> None:
    """Removes the temporary files that killed writers of `names` left in a folder. Nobody may be writing them now."""
    for name in names:
        for temporary in folder.glob(f".{glob.escape(name)}.{'?' * 8}"):
            temporary.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any) -> None:
    """Writes `value` as indented JSON, atomically. Raises OSError as `write_atomic` does."""
    write_atomic(path, (json.dumps(value, indent=2) + "\n").encode())


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def sidecar_path(path: Path) -> Path:
    """`ptq.safetensors.json` of `ptq.safetensors`: files that differ only in suffix have their own sidecars."""
    return path.with_name(path.name + ".json")


def write_with_sidecar(path: str | Path, data: bytes, kind: str, values: dict[str, Any]) -> None:
    """Writes a file and its sidecar, each atomically; the sidecar, with the checksum of the file, last.

    Args:
        kind: what the file is: "checkpoint", "engine", "package", "bundle" or "calibration cache".
        values: what the sidecar says of it.

    Raises:
        ValueError: the sidecar's name belongs to a file of another kind.
        OSError: nothing could be written.
    """
    path = Path(path)
    check_replaceable(sidecar_path(path), kind)
    write_atomic(path, data)
    try:
        write_json(sidecar_path(path), {"kind": kind, **values, "sha256": hashlib.sha256(data).hexdigest()})
    except NotSaved as error:
        del _saved[path]  # it is of no use without
        raise NotSaved(f"{error}; without it, {path} cannot be read") from error


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
    """Whether a JSON file may be written: nothing is there, JSON of the same kind, or a device.

    Raises:
        ValueError: a file of another kind is there.
        NotSaved: what is there cannot be seen.
    """
    with _saving(path):
        status = _status(path)
    if status is None or not _is_replaced(status):
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
