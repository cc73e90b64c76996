"""Text that is safe to print.

Names of files, of members of archives and of nodes come from elsewhere, and a terminal obeys what it is sent.
"""

import copy
import io
import logging as records
from collections.abc import Iterable
from typing import TextIO

from absl import logging


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


class PrintableFormatter(logging.PythonFormatter):
    """absl's format of a record: its message is one line, its traceback is lines."""

    def format(self, record: records.LogRecord) -> str:
        safe = copy.copy(record)
        safe.msg, safe.args = printable(record.getMessage()), None
        return printable(super().format(safe), keep="\n\t")


def text_of(lines: Iterable[str]) -> str:
    """The lines of a table as one text, each printable: no name in it makes a line of its own."""
    return "\n".join(map(printable, lines))
