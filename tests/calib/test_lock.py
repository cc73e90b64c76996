"""One job a folder, also when two start at the same moment, and none is shut out by one that was killed."""

import contextlib
import errno
import fcntl
import os
import re
import signal
import socket
import subprocess
import sys

import pytest

from qswin.calib.lock import LOCK, lock_file, lock_folder

HOLDER = """
import sys, time
from pathlib import Path
from qswin.calib.lock import lock_folder
with lock_folder(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@contextlib.contextmanager
def holder(folder):
    """Another process that holds the lock."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def take(folder):
    with lock_folder(folder) as locked:
        return locked


def test_the_other_process_is_named(tmp_path):
    with holder(tmp_path) as process:
        named = f"{tmp_path}: process {process.pid} on {socket.gethostname()} is at work there; wait"
        with pytest.raises(ValueError, match=f"^{re.escape(named)}.*choose another run=FOLDER"):
            take(tmp_path)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert (tmp_path / LOCK).exists() and take(tmp_path)  # what a killed job leaves keeps nobody out
    assert not (tmp_path / LOCK).exists()


def test_a_forked_child_does_not_keep_the_lock(tmp_path):
    """A decoding process lives on for some seconds when its parent is killed."""
    with lock_folder(tmp_path):
        reader, writer = os.pipe()
        if not (child := os.fork()):
            os.close(writer)
            os.read(reader, 1)
            os._exit(0)
        with pytest.raises(ValueError, match="is at work there"):
            take(tmp_path)
    assert take(tmp_path)
    os.close(writer)
    os.waitpid(child, 0)
    os.close(reader)


def test_a_lock_whose_file_went_meanwhile_is_taken_again(tmp_path, monkeypatch):
    """Another job that ends between opening and locking removes the file: its name is nobody's lock any more."""
    flock, calls = fcntl.flock, []

    def slow(descriptor, operation):
        calls.append(descriptor)
        if len(calls) == 1:
            (tmp_path / LOCK).unlink()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", slow)
    with lock_folder(tmp_path):
        assert len(calls) == 2 and os.path.samestat(os.fstat(calls[1]), (tmp_path / LOCK).stat())


def test_a_folder_in_which_nothing_is_left_goes(tmp_path):
    with lock_folder(tmp_path / "a" / "b"):
        pass
    assert not (tmp_path / "a").exists()
    with lock_folder(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "file").touch()
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["file"]


@pytest.mark.parametrize(("code", "words"), [(errno.ENOLCK, "No locks available"), (errno.EOPNOTSUPP, "not supported")])
def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, caplog, code, words):
    def refuse(descriptor, operation):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    caplog.set_level("WARNING", logger="absl")
    with lock_folder(tmp_path) as locked:
        assert not locked
    assert len(caplog.records) == 1 and words in caplog.text and "start no other job there" in caplog.text


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"file/run: cannot be made \(Not a directory\); choose another run=FOLDER"):
        take(tmp_path / "file" / "run")


def test_a_result_is_locked_apart_from_its_folder(tmp_path):
    """Two results of one folder are two jobs'."""
    with lock_folder(tmp_path), lock_file(tmp_path / "a.json", "--json"), lock_file(tmp_path / "b.json", "--json"):
        with pytest.raises(ValueError, match=r"a\.json: process .* is at work there; .* choose another --json FILE"):
            with lock_file(tmp_path / "a.json", "--json"):
                pass
    assert not list(tmp_path.iterdir())


def test_a_full_disk_has_locks(tmp_path, monkeypatch):
    """Only who holds one cannot be written there."""

    def full(descriptor, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    with lock_folder(tmp_path) as locked:
        assert locked
        with pytest.raises(ValueError, match="another process is at work there"):
            take(tmp_path)
    assert not list(tmp_path.iterdir())
