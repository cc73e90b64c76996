"""Atomic writes, with a disk that is really full."""

import hashlib
import json
import os
import stat
import subprocess
import sys
import threading

import pytest

from qswin.calib.files import (
    NotSaved,
    check_suffix,
    read_sidecar,
    remove_temporaries,
    sha256,
    sidecar_path,
    write_atomic,
    write_result,
    write_with_sidecar,
)


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


def test_a_link_is_followed(tmp_path):
    """Its target is replaced as a whole, and made where the link leads nowhere yet."""
    (tmp_path / "real").mkdir()
    link, target = tmp_path / "a.bin", tmp_path / "real" / "b.bin"
    link.symlink_to("real/b.bin")
    for data in (b"first", b"2nd"):
        write_atomic(link, data)
        assert link.is_symlink() and target.read_bytes() == data
    assert sorted(tmp_path.rglob("*")) == [link, target.parent, target]


def test_a_circle_of_links_is_an_error(tmp_path):
    link = tmp_path / "a.bin"
    link.symlink_to(link)
    with pytest.raises(OSError, match=r"a\.bin: not saved \(Too many levels of symbolic links\)"):
        write_atomic(link, b"x")
    assert link.is_symlink()


def test_a_device_is_written_to(tmp_path):
    """As root, a file renamed over /dev/null would take its place."""
    link = tmp_path / "null"
    link.symlink_to(os.devnull)
    for path in (os.devnull, link):
        write_atomic(path, b"x")
        write_result(path, "evaluation", {})
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode) and link.is_symlink()


def test_a_fifo_is_written_to(tmp_path):
    os.mkfifo(fifo := tmp_path / "fifo")
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(fifo.read_bytes()))
    reader.start()
    write_atomic(fifo, b"x" * 100_000)
    reader.join(10)
    assert read == [b"x" * 100_000] and fifo.is_fifo()


@pytest.mark.parametrize("name", ["/dev/stdout", "out.txt"])
def test_standard_output_that_is_a_file_keeps_what_was_printed(tmp_path, name):
    script = f"""
import sys
from qswin.calib.files import write_atomic
print("before", flush=True)
write_atomic({name!r}, b"written\\n")
print("after")
"""
    with (tmp_path / "out.txt").open("w") as file:
        subprocess.run([sys.executable, "-c", script], stdout=file, check=True, cwd=tmp_path, env=os.environ)
    assert (tmp_path / "out.txt").read_text() == "before\nwritten\nafter\n"


def test_permissions_are_those_of_the_umask_and_of_the_file_that_was_there(tmp_path):
    before = os.umask(0o027)
    try:
        write_atomic(file := tmp_path / "a.bin", b"x")
        assert stat.S_IMODE(file.stat().st_mode) == 0o640
        file.chmod(0o600)
        write_atomic(file, b"y")
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    finally:
        os.umask(before)


def test_what_killed_writers_left_is_removed(tmp_path):
    for name in (".last.pt.0123abcd", ".last.pt.tmp_x1y2", ".other.pt.0123abcd", ".last.pt.kept", "last.pt"):
        (tmp_path / name).touch()
    remove_temporaries(tmp_path, ["last.pt"])
    assert sorted(file.name for file in tmp_path.iterdir()) == [".last.pt.kept", ".other.pt.0123abcd", "last.pt"]


def test_a_folder_that_cannot_be_made_is_an_os_error(tmp_path):
    (tmp_path / "file").write_text("")
    for write in (lambda path: write_atomic(path, b"x"), lambda path: write_result(path, "evaluation", {})):
        with pytest.raises(NotSaved, match=r"file/a\.json: not saved \(Not a directory\); choose another name"):
            write(tmp_path / "file" / "a.json")


def test_files_that_differ_in_their_suffix_have_sidecars_of_their_own(tmp_path):
    for name, kind in (("int8.engine", "engine"), ("int8.pt2", "package"), ("int8.safetensors", "checkpoint")):
        write_with_sidecar(tmp_path / name, name.encode(), kind, {"name": name})
    for name, kind in (("int8.engine", "engine"), ("int8.pt2", "package"), ("int8.safetensors", "checkpoint")):
        assert read_sidecar(tmp_path / name, kind, ("name",), "")["name"] == name


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "engine"}, "its kind is 'engine', not 'checkpoint'; save again"),
        ({"sha256": "0"}, "changed since its sidecar was written; save again"),
        ({"recipe": None}, None),
    ],
)
def test_a_sidecar_must_be_of_its_file_and_kind(tmp_path, change, words):
    file = tmp_path / "a.safetensors"
    write_with_sidecar(file, b"tensors", "checkpoint", {"recipe": 1})
    sidecar_path(file).write_text(json.dumps(json.loads(sidecar_path(file).read_text()) | change))
    if words is None:
        assert read_sidecar(file, "checkpoint", ("recipe",), "save again")["recipe"] is None
    else:
        with pytest.raises(ValueError, match=words):
            read_sidecar(file, "checkpoint", ("recipe",), "save again")


def test_a_result_never_replaces_a_file_of_another_kind(tmp_path):
    checkpoint = tmp_path / "ptq.safetensors"
    write_with_sidecar(checkpoint, b"tensors", "checkpoint", {})
    for taken in (checkpoint, sidecar_path(checkpoint)):
        before = taken.read_bytes()
        with pytest.raises(ValueError, match="would be lost; choose another name"):
            write_result(taken, "evaluation", {"acc1": 50.0})
        assert taken.read_bytes() == before
    result = tmp_path / "r.json"
    for acc1 in (50.0, 51.0):
        write_result(result, "evaluation", {"acc1": acc1})
    written = json.loads(result.read_text())
    assert written["kind"] == "evaluation" and written["acc1"] == 51.0 and "python" in written["versions"]


def test_a_dash_is_standard_output(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_result("-", "evaluation", {"acc1": 50.0})
    assert json.loads(capsys.readouterr().out)["acc1"] == 50.0 and not list(tmp_path.iterdir())


def test_an_output_is_named_as_its_kind(tmp_path):
    with pytest.raises(ValueError, match=r"--engine a.safetensors: the name must end in .engine or .plan"):
        check_suffix("--engine", tmp_path.__class__("a.safetensors"), (".engine", ".plan"))
