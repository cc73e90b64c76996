"""What `qswin doctor` says of a thing: what was found, or the command that adds it."""

from typing import NamedTuple

from qswin.calib.files import version_of


class Finding(NamedTuple):
    """A thing that was looked for: what was found and allows, or None and the command that adds it."""

    name: str
    found: str | None
    note: str


def library(distribution: str, needed_for: str, install: str | None = None) -> Finding:
    """A Python library.

    Args:
        install: what pip is to install, if not the distribution.
    """
    found = version_of(distribution)
    missing = f"for {needed_for}: pip install {install or distribution}"
    return Finding(distribution, found, needed_for if found else missing)
