"""JSON files beside the weights: what a schema has of them, and no more."""

from pathlib import Path
from typing import TypeVar

import msgspec

LARGEST = 1 << 26  # bytes
T = TypeVar("T")


def read_json(file: Path, schema: type[T]) -> T:
    """The keys of a JSON file that a schema has. Raises ValueError for what is not JSON, or of another type."""
    try:
        with file.open("rb") as opened:
            data = opened.read(LARGEST + 1)
        if len(data) > LARGEST:
            raise ValueError(f"{file.name} is larger than {LARGEST >> 20} MiB")
        return msgspec.json.decode(data, type=schema)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise ValueError(f"{file.name} cannot be read: {error}; copy it again") from error
