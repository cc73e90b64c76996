"""Atomic writes, with a disk that is really full."""

import hashlib
import subprocess
import sys

import pytest

from qswin.calib.files import sha256, write_atomic


def test_a_write_replaces_the_whole_file(tmp_path):
    file = tmp_path / "new" / "a.bin"
    write_atomic(file, b"first")
    write_atomic(file, b"2nd")
    assert file.read_bytes() == b"2nd" and list(file.parent.iterdir()) == [file]
    assert sha256(file) == hashlib.sha256(b"2nd").hexdigest()


def test_a_full_disk_leaves_what_was_there(tmp_path):
    """The kernel refuses bytes past a size limit, as it does when a disk is full."""
    file = tmp_path / "a.bin"
    file.write_bytes(b"before")
    script = f"""
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
from qswin.calib.files import write_atomic
write_atomic({str(file)!r}, b"x" * 5000)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 1 and "not saved" in done.stderr and "free some space" in done.stderr
    assert file.read_bytes() == b"before" and list(tmp_path.iterdir()) == [file]


def test_a_folder_that_cannot_be_made_is_an_os_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        write_atomic(tmp_path / "file" / "a.bin", b"x")
