"""One job a folder or result: a lock that the kernel releases when the process that holds it ends, however it ends."""

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from absl import logging

from qswin.calib.reading import read_regular

LOCK = ".lock"
_held: set[int] = set()  # descriptors of the locks that this process holds


def _let_go() -> None:
    """In a forked child: a decoding process that outlives its parent must not keep the parent's lock."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[bool]:
    """Keeps other jobs out of a folder, which is made if it is missing, and removed again if nothing is left in it.

    Yields:
        Whether the folder is locked. A read-only file system, or one that has no locks, cannot; a warning says so.

    Raises:
        ValueError: another process holds the lock; it is named.
        OSError: the folder cannot be made.
    """
    with _locked(folder, folder / LOCK, "run=FOLDER") as locked:
        yield locked


@contextlib.contextmanager
def lock_file(path: Path, option: str) -> Iterator[bool]:
    """Keeps other jobs away from a result that is written again and again. As `lock_folder`, which see.

    Args:
        option: the flag that names the result.
    """
    with _locked(path, path.with_name(f".{path.name}{LOCK}"), f"{option} FILE") as locked:
        yield locked


@contextlib.contextmanager
def _locked(what: Path, lock: Path, other: str) -> Iterator[bool]:
    """Holds a lock on something; `other` is the setting that chooses something else."""
    made = [path for path in (lock.parent, *lock.parent.parents) if not path.exists()]
    descriptor = _take(what, lock, other)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            lock.unlink(missing_ok=True)  # while it is held: who waits for it looks at the name again
            _held.discard(descriptor)
            os.close(descriptor)
        for path in made:
            with contextlib.suppress(OSError):  # it is not empty
                path.rmdir()


def _take(what: Path, lock: Path, other: str) -> int | None:
    """The descriptor of a lock, held; None where the file system has no locks. Raises as `lock_folder`."""
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"{lock.parent}: cannot be made ({error.strerror}); choose another {other}") from error
    try:
        while (descriptor := _open(lock)) is None:
            pass
        return descriptor
    except BlockingIOError as error:
        raise ValueError(
            f"{what}: {_holder(lock)} is at work there; wait until it has ended, stop it, or choose another {other}"
        ) from error
    except OSError as error:
        logging.warning("%s: cannot be locked (%s); start no other job there meanwhile", what, error.strerror)
        return None


def _open(path: Path) -> int | None:
    """Opens the lock's file and takes the lock; None where another process has removed the file since.

    Raises:
        BlockingIOError: another process holds it.
        OSError: the file system is read-only, or has no locks.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not _is_at(descriptor, path):
            os.close(descriptor)
            return None
    except OSError:
        os.close(descriptor)
        raise
    with contextlib.suppress(OSError):  # the disk is full: the lock holds, and says not whose it is
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
    _held.add(descriptor)
    return descriptor


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file still has its name."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _holder(path: Path) -> str:
    """Who holds a lock, as its file says."""
    try:
        return read_regular(path, 200).decode(errors="replace") or "another process"
    except (OSError, ValueError):
        return "another process"
