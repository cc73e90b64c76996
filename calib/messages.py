"""Text that is safe to print.

Names of files, of members of archives and of nodes come from elsewhere, and a terminal obeys what it is sent.
"""

import copy
import io
import logging as records
import os
import stat
import sys
from collections.abc import Iterable
from typing import TextIO

from absl import logging

RED, YELLOW = 1, 3


def printable(text: str, keep: str = "") -> str:
    r"""The text with all that a terminal would obey or cannot show as Python writes it: "\x1b", "\n", "\udcff".

    Args:
        keep: characters that stay as they are.
    """
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


class PrintableStream(io.TextIOBase):
    """Writes to another stream what is printable, line by line."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(printable(text, keep="\n\t"))
        return len(text)

    def flush(self) -> None:
        self._stream.flush()

    def fileno(self) -> int:
        return self._stream.fileno()

    def isatty(self) -> bool:
        return self._stream.isatty()


def coloured(text: str, colour: int, stream: TextIO) -> str:
    """The text in one of a terminal's eight colours; as it is where the stream is none, or NO_COLOR is set."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not stream.isatty()
    return text if plain else f"\x1b[{30 + colour}m{text}\x1b[0m"


def is_regular_file(stream: TextIO) -> bool:
    """Whether what is written goes to a file, not to a terminal or through a pipe."""
    try:
        return stat.S_ISREG(os.fstat(stream.fileno()).st_mode)
    except (OSError, ValueError):  # it has no descriptor, or is closed
        return False


class PrintableFormatter(logging.PythonFormatter):
    """absl's format of a record: its message is one line, its traceback is lines."""

    def format(self, record: records.LogRecord) -> str:
        safe = copy.copy(record)
        safe.msg, safe.args = printable(record.getMessage()), None
        return printable(super().format(safe), keep="\n\t")


class LineFormatter(PrintableFormatter):
    """For people: `qswin: message`. With time, process and place in a file, and where --verbosity asks for more."""

    def format(self, record: records.LogRecord) -> str:
        if logging.get_verbosity() > logging.INFO or is_regular_file(sys.stderr):
            return super().format(record)
        rank = os.environ.get("RANK", "0")
        warns = record.levelno >= records.WARNING
        kind = coloured(f"{record.levelname.lower()}: ", YELLOW, sys.stderr) if warns else ""
        return f"qswin{'' if rank == '0' else f'[{printable(rank)}]'}: {kind}{printable(record.getMessage())}"


def text_of(lines: Iterable[str]) -> str:
    """The lines of a table as one text, each printable: no name in it makes a line of its own."""
    return "\n".join(map(printable, lines))
