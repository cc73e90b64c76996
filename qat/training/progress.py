"""What a training run leaves on its way: last.pt, from which it goes on, log.jsonl and TensorBoard's files."""

import contextlib
import io
import json
import pickle
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

from qswin.calib.files import NotSaved, write_atomic
from qswin.calib.reading import parse_json
from qswin.models.checkpoints.state_dicts import BROKEN
from qswin.qat.runs import LOG

Log = Callable[[dict[str, float]], None]
LAST = "last.pt"
REMEDY = "delete it, or start over with resume=never"


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Writes last.pt, atomically."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomic(folder / LAST, buffer.getvalue())


def load_state(folder: Path, device: torch.device) -> dict[str, Any] | None:
    """What last.pt holds, or None where there is none. Raises ValueError when it cannot be read."""
    path = folder / LAST
    if not path.is_file():
        return None
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except (*BROKEN, pickle.UnpicklingError) as error:
        raise ValueError(f"{path}: cannot be read; {REMEDY}") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path}: not the state of a training but a {type(state).__name__}; {REMEDY}")
    return state


@contextlib.contextmanager
def open_log(folder: Path, step: int) -> Iterator[Log]:
    """Logs values, which name their "step", to log.jsonl and TensorBoard. Lines of steps that are repeated are dropped.

    Args:
        step: the first that will be logged.

    Raises:
        NotSaved: the disk is full, also when something is logged.
    """
    path = folder / LOG
    kept = _lines_before(path, step) if path.is_file() and step else []
    write_atomic(path, "".join(f"{line}\n" for line in kept).encode())
    with _saving(path), _quiet_threads():
        file, board = open(path, "a"), SummaryWriter(str(folder / "tensorboard"), purge_step=step)

    def log(values: dict[str, float]) -> None:
        with _saving(path):
            file.write(json.dumps(values) + "\n")
            file.flush()
            for name, value in values.items():
                board.add_scalar(name, value, values["step"])

    try:
        with _quiet_threads():
            yield log
    finally:
        with _saving(path), _quiet_threads(), file:
            board.close()


@contextlib.contextmanager
def _saving(path: Path) -> Iterator[None]:
    """Names the log where the disk is full: neither a stream that is open nor TensorBoard does."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise NotSaved(f"{path.parent}: its {LOG} or tensorboard/ is not saved ({reason}); free some space") from error


@contextlib.contextmanager
def _quiet_threads() -> Iterator[None]:
    """TensorBoard's thread prints the traceback of an OSError, and raises it in this one too."""
    before = threading.excepthook

    def quiet(args: Any) -> None:
        if not isinstance(args.exc_value, OSError):
            before(args)

    threading.excepthook = quiet
    try:
        yield
    finally:
        threading.excepthook = before


def _lines_before(path: Path, step: int) -> list[str]:
    """The lines of a log of the steps before one. Raises ValueError for a file that is no log."""
    whole = [line for line in path.read_text(errors="replace").splitlines() if line.endswith("}")]
    values = [parse_json(line, str(path)) for line in whole]
    if not all(isinstance(value, dict) and isinstance(value.get("step"), int) for value in values):
        raise ValueError(f"{path}: not the log of a training; delete it, or start over with resume=never")
    return [line for line, value in zip(whole, values, strict=True) if value["step"] < step]
