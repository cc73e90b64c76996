"""Batches of labelled images as NumPy arrays, decoded by processes, for calibration and evaluation. No torch."""

import contextlib
import ctypes
import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from qswin.calib.data.folders import Sample
from qswin.calib.data.images import Preprocessing, load_image, load_mask
from qswin.calib.data.shards import ImageFile

MOST_IMAGES = 65_536  # of a batch that a flag asks for
MOST_PROCESSES = 16  # by default
IMAGES_EACH = 64  # images that a process is worth starting for: they take one process half a second or more
Target = int | np.ndarray  # a class index, or a mask (H, W) uint8
Decoded = list[Target | ValueError]  # for each sample of a batch: its target, or the error of its files


class Batch(NamedTuple):
    images: np.ndarray  # (N, 3, H, W) float32, normalised
    labels: np.ndarray  # (N,) int64 class indices, or (N, H, W) uint8 masks
    files: list[ImageFile]  # of the images


def joined(outputs: Sequence[np.ndarray]) -> np.ndarray:
    """The only output of a model, (N, ...), or all of them as one array, (N, values)."""
    return (
        outputs[0] if len(outputs) == 1 else np.concatenate([each.reshape(len(each), -1) for each in outputs], axis=1)
    )


def fill_up(images: np.ndarray, size: int) -> np.ndarray:
    """A batch of at least `size` images: the last image is repeated. The caller drops the outputs of the repeats.

    Args:
        images: (N, 3, H, W); N is at least 1.

    Returns:
        (max(N, size), 3, H, W).
    """
    missing = size - len(images)
    return np.concatenate([images, np.repeat(images[-1:], missing, axis=0)]) if missing > 0 else images


def ahead(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Yields the same batches; a thread fetches the next one while the caller works on the current one."""
    with ThreadPoolExecutor(1) as thread:
        upcoming = thread.submit(next, batches, None)
        while (batch := upcoming.result()) is not None:
            upcoming = thread.submit(next, batches, None)
            yield batch


def warn_of_skipped(skipped: Sequence[ImageFile] | None) -> None:
    """Says how many unreadable images `image_batches` left out, and names the first."""
    if skipped:
        logging.warning("%d unreadable images skipped, the first is %s", len(skipped), skipped[0])


def decoding_processes(workers: int | None, images: int) -> int:
    """How many processes decode: as many as are asked for.

    By default one a core, of which torchrun's processes share those of the machine; at most 16; and none for few
    images, which are decoded sooner than a second process has started: that takes one to two seconds.
    """
    if workers is not None:
        return workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), MOST_PROCESSES, images // IMAGES_EACH)


def image_batches(
    samples: Sequence[Sample],
    preprocessing: Preprocessing,
    batch_size: int,
    workers: int | None = None,
    skipped: list[ImageFile] | None = None,
) -> Iterator[Batch]:
    """Yields batches in the order of `samples`.

    A script must call this under `if __name__ == "__main__"`, because multiprocessing imports the script again.

    Args:
        workers: decoding processes; as many batches are decoded ahead. With fewer than two workers, or fewer than two
            batches, the calling process decodes. None: see `decoding_processes`.
        skipped: a list to which unreadable files are added, which are then left out. Without a list they are an error.

    Raises:
        ValueError: a file cannot be read, and `skipped` is None.
        ChildProcessError: a decoding process was killed.
    """
    chunks = [samples[at : at + batch_size] for at in range(0, len(samples), batch_size)]
    workers = min(decoding_processes(workers, len(samples)), len(chunks))
    decoding = _by_processes(chunks, preprocessing, workers) if workers > 1 else _by_this_process(chunks, preprocessing)
    for chunk, (images, decoded) in zip(chunks, decoding, strict=True):
        yield from _collect(chunk, images, decoded, skipped)


def _by_this_process(
    chunks: Sequence[Sequence[Sample]], preprocessing: Preprocessing
) -> Iterator[tuple[np.ndarray, Decoded]]:
    for chunk in chunks:
        images = np.empty((len(chunk), 3, *preprocessing.size), dtype=np.float32)
        yield images, _decode(chunk, preprocessing, images)


def _by_processes(
    chunks: Sequence[Sequence[Sample]], preprocessing: Preprocessing, workers: int
) -> Iterator[tuple[np.ndarray, Decoded]]:
    """Batches that processes decode into slots of shared memory; threads would wait for the interpreter lock."""
    # A fork of this process would copy its CUDA context and the locks of its threads. A fork server has neither.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["qswin.calib.data.batches"])
    size = max(map(len, chunks)) * 3 * preprocessing.size[0] * preprocessing.size[1]
    slots = [context.RawArray(ctypes.c_float, size) for _ in range(workers + 1)]
    free, pending = deque(range(len(slots))), deque[tuple[int, int, Future[Decoded]]]()
    remaining = iter(chunks)
    with ProcessPoolExecutor(workers, context, _start_worker, (slots, preprocessing)) as pool, _leaving(pending):
        while True:
            for chunk in itertools.islice(remaining, len(free)):
                slot = free.popleft()
                with _without_ctrl_c():
                    pending.append((slot, len(chunk), pool.submit(_decode_to_slot, chunk, slot)))
            if not pending:
                return
            slot, count, future = pending.popleft()
            decoded = future.result()
            images = _view(slots[slot], count, preprocessing).copy()
            free.append(slot)
            yield images, decoded


@contextlib.contextmanager
def _without_ctrl_c() -> Iterator[None]:
    """Processes that are started within get no Ctrl-C, not even while they start: their parent handles it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _leaving(pending: deque[tuple[int, int, Future[Decoded]]]) -> Iterator[None]:
    """Cancels what is decoded ahead when the caller stops early. A worker that died becomes a ChildProcessError."""
    try:
        yield
    except BrokenProcessPool as error:
        raise ChildProcessError(
            "a decoding process died; use fewer workers if memory ran out; a script needs `if __name__ == '__main__':`"
        ) from error
    finally:
        for _, _, future in pending:
            future.cancel()


_slots: list[Any] = []  # set in each decoding process, as is _preprocessing
_preprocessing = Preprocessing()


def _start_worker(slots: list[Any], preprocessing: Preprocessing) -> None:
    """Prepares a decoding process. It ends when the parent is killed."""
    global _slots, _preprocessing
    _slots, _preprocessing = slots, preprocessing
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _decode_to_slot(chunk: Sequence[Sample], slot: int) -> Decoded:
    return _decode(chunk, _preprocessing, _view(_slots[slot], len(chunk), _preprocessing))


def _view(slot: Any, count: int, preprocessing: Preprocessing) -> np.ndarray:
    """The first `count` images of a slot, (count, 3, H, W)."""
    shape = (count, 3, *preprocessing.size)
    return np.frombuffer(slot, dtype=np.float32, count=int(np.prod(shape))).reshape(shape)


def _decode(chunk: Sequence[Sample], preprocessing: Preprocessing, out: np.ndarray) -> Decoded:
    return [_load(sample, preprocessing, image) for sample, image in zip(chunk, out, strict=True)]


def _load(sample: Sample, preprocessing: Preprocessing, out: np.ndarray) -> Target | ValueError:
    """Writes a sample's image to `out` and returns its target."""
    path, target = sample
    try:
        load_image(path, preprocessing, out)
        return load_mask(target, path, preprocessing) if isinstance(target, Path) else target
    except ValueError as error:
        return error


def _collect(
    chunk: Sequence[Sample], images: np.ndarray, decoded: Decoded, skipped: list[ImageFile] | None
) -> Iterator[Batch]:
    """Yields the batch, or nothing when all of its files are skipped."""
    errors = [target for target in decoded if isinstance(target, ValueError)]
    if errors and skipped is None:
        raise errors[0]
    kept = [index for index, target in enumerate(decoded) if not isinstance(target, ValueError)]
    if skipped is not None:
        skipped += [path for (path, _), target in zip(chunk, decoded, strict=True) if isinstance(target, ValueError)]
    if kept:
        labels = np.asarray([decoded[index] for index in kept])
        yield Batch(images if len(kept) == len(chunk) else images[kept], labels, [chunk[index][0] for index in kept])
