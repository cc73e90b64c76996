"""Batches that processes decode against the same files read one by one."""

import contextlib
import os
import select
import signal
import subprocess
import sys

import numpy as np
import psutil
import pytest

from qswin.calib.data.batches import decoding_processes, fill_up, image_batches
from qswin.calib.data.folders import scan_folder
from qswin.calib.data.images import Preprocessing, load_image

PREPROCESSING = Preprocessing(size=(8, 8))
READ_SLOWLY = """
import sys, time
from qswin.calib.data.batches import image_batches
from qswin.calib.data.folders import scan_folder
from qswin.calib.data.images import Preprocessing
from pathlib import Path
if __name__ == "__main__":
    samples = scan_folder("classification", Path(sys.argv[1])).samples
    for batch in image_batches(samples, Preprocessing(size=(8, 8)), 2, 2):
        print("batch", flush=True)
        time.sleep(60)
"""


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_every_image_comes_once_and_in_order(data, batch_size, workers):
    folder = scan_folder("classification", data / "val")
    batches = list(image_batches(folder.samples, PREPROCESSING, batch_size, workers))
    assert np.concatenate([batch.labels for batch in batches]).tolist() == [label for _, label in folder.samples]
    assert {len(batch.labels) for batch in batches[:-1]} <= {batch_size}
    pixels = np.concatenate([batch.images for batch in batches])
    np.testing.assert_array_equal(pixels, [load_image(path, PREPROCESSING) for path, _ in folder.samples])


@pytest.mark.parametrize("workers", [1, 3])
def test_an_unreadable_image_is_named_or_skipped(data, workers):
    bad = data / "val" / "class1" / "1.png"
    bad.write_bytes(bad.read_bytes()[:100])
    folder = scan_folder("classification", data / "val")
    with pytest.raises(ValueError, match=r"class1/1\.png.*skip_unreadable"):
        list(image_batches(folder.samples, PREPROCESSING, 4, workers))
    skipped = []
    batches = list(image_batches(folder.samples, PREPROCESSING, 1, workers, skipped))
    assert skipped == [bad] and len(batches) == 19


def test_batches_are_the_callers_to_keep(data):
    samples = scan_folder("classification", data / "val").samples
    first, *others = image_batches(samples, PREPROCESSING, 2, 2)
    before = first.images.copy()
    for batch in others:
        batch.images[:] = 0
    np.testing.assert_array_equal(first.images, before)


def test_a_batch_is_filled_up_with_its_last_image():
    images = np.arange(2 * 3 * 4 * 4, dtype=np.float32).reshape(2, 3, 4, 4)
    filled = fill_up(images, 4)
    np.testing.assert_array_equal(filled, images[[0, 1, 1, 1]])
    assert fill_up(images, 2) is images and fill_up(images, 1) is images


@pytest.fixture
def reader(data, tmp_path):
    """A process that reads batches, and those that decode for it."""
    (tmp_path / "read.py").write_text(READ_SLOWLY)
    command = [sys.executable, str(tmp_path / "read.py"), str(data / "val")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "batch\n"
        yield process, psutil.Process(process.pid).children(recursive=True)
        process.kill()


def test_decoding_processes_get_no_ctrl_c(data, tmp_path):
    """Not even while they start: a terminal sends it to all processes, and each would print a traceback."""
    (tmp_path / "read.py").write_text(READ_SLOWLY)
    command = [sys.executable, str(tmp_path / "read.py"), str(data / "val")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while not select.select([process.stdout], [], [], 0.02)[0]:
            for child in psutil.Process(process.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "batch\n"
        process.kill()
        assert "KeyboardInterrupt" not in process.stderr.read()


def test_decoding_ends_with_a_killed_reader(reader):
    process, children = reader
    assert children
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive


def is_server(process: psutil.Process) -> bool:
    """Whether it starts the decoding processes; one that has ended meanwhile does not."""
    try:
        return "forkserver" in " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return False


def test_a_killed_decoding_process_is_an_error(data):
    batches = image_batches(scan_folder("classification", data / "val").samples, PREPROCESSING, 1, 2)
    next(batches)
    (server,) = filter(is_server, psutil.Process().children())
    for worker in server.children():
        with contextlib.suppress(psutil.NoSuchProcess):  # once one has died, the pool ends the others
            worker.kill()
    psutil.wait_procs(server.children(), timeout=20)
    with pytest.raises(ChildProcessError, match="decoding process died"):
        list(batches)


@pytest.mark.parametrize(
    ("workers", "images", "cores", "ranks", "expected"),
    [
        (3, 10**6, 8, 1, 3),  # as asked for
        (0, 10**6, 8, 1, 0),
        (None, 10**6, 8, 1, 8),
        (None, 10**6, 64, 1, 16),
        (None, 10**6, 64, 8, 8),
        (None, 200, 8, 1, 3),
        (None, 20, 8, 1, 0),
    ],
)
def test_a_process_a_core_decodes_unless_it_is_not_worth_it(monkeypatch, workers, images, cores, ranks, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    assert decoding_processes(workers, images) == expected
