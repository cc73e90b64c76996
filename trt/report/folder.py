"""What of a run's folder a report reads: regular files of its own, of a bounded size. The rest it lists as skipped."""

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from qswin.calib.reading import JSON_BYTES

T = TypeVar("T")
LARGEST = {  # bytes of a file, by its suffix
    ".json": JSON_BYTES,
    ".jsonl": JSON_BYTES,
    ".png": 16 << 20,
    ".npz": 64 << 20,
    ".safetensors": 16 << 30,
}


class RunFolder:
    """A run's folder.

    Attributes:
        skipped: {file: why the report does not show it}.

    Raises:
        FileNotFoundError: there is no such folder.
    """

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise FileNotFoundError(f"{root}: no such folder")
        self.root = root
        self.skipped: dict[str, str] = {}

    def name(self, path: Path) -> str:
        """A file's name as the page shows it."""
        return str(path.relative_to(self.root))

    def skip(self, path: Path, reason: object) -> None:
        """Lists a file as skipped. A reason that begins with the file's name is shown without it."""
        self.skipped[self.name(path)] = str(reason).removeprefix(f"{path}: ")

    def files(self, pattern: str) -> Iterator[Path]:
        """The files of a pattern that can be read, in order; the others are skipped."""
        for path in sorted(self.root.glob(pattern)):
            if (reason := self._unreadable(path)) is None:
                yield path
            else:
                self.skip(path, reason)

    def read(self, pattern: str, reader: Callable[[Path], T]) -> Iterator[tuple[Path, T]]:
        """The files of a pattern and what a reader makes of each; those that it refuses are skipped."""
        for path in self.files(pattern):
            try:
                found = reader(path)
            except (ValueError, OSError) as error:
                self.skip(path, error)
            else:
                yield path, found

    def _unreadable(self, path: Path) -> str | None:
        """Why a file is not read; None for one that is."""
        if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(self.root)):
            return "a link to a file outside of the folder"
        try:
            status = path.stat()
        except OSError as error:
            return f"cannot be read ({error.strerror})"
        if not stat.S_ISREG(status.st_mode):
            return "not a regular file"
        largest = LARGEST[path.suffix]
        return None if status.st_size <= largest else f"larger than {largest >> 20} MiB"
