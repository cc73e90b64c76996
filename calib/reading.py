"""Reading that ends: regular files of a bounded size, JSON and YAML of a bounded depth in which no key stands twice.

Every file of JSON or YAML that the project reads is read here, but for those that transformers writes beside weights
(models/checkpoints/json_files.py).
"""

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

import yaml

JSON_BYTES = 64 << 20
YAML_BYTES = 1 << 20
DEPTH = 64  # mappings and lists in each other
NODES = 20_000  # values, mappings and lists of a YAML file, a repeated one counted each time
MALFORMED = (  # what PyYAML raises over values that do not fit their tags
    *(yaml.YAMLError, ValueError, ArithmeticError, LookupError, AttributeError, TypeError, RecursionError),
)


def open_regular(path: str | Path) -> BinaryIO:
    """Opens a file for reading. Raises OSError for what is not a regular file: a FIFO or a device may never end."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a FIFO would wait for its writer
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return os.fdopen(descriptor, "rb")


def read_regular(path: str | Path, limit: int) -> bytes:
    """What a regular file of at most `limit` bytes holds.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a regular file, cannot be opened, or is larger.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size  # of /proc's files it is 0
            data = b"" if size > limit else file.read(limit + 1)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: no such file") from error
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    if max(size, len(data)) > limit:
        raise ValueError(f"{path}: larger than {limit / 2**20:g} MiB, which no file of its kind is")
    return data


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises FileNotFoundError, and ValueError where the file holds anything else."""
    values = parse_json(read_regular(path, JSON_BYTES), str(path))
    if not isinstance(values, dict):
        raise ValueError(f"{path}: not a JSON object; delete it, or make it again")
    return values


def parse_json(text: str | bytes, name: str) -> Any:
    """The value of a JSON text. Raises ValueError, which names it by `name`, for what is malformed or too deep."""
    try:
        value = json.loads(text, object_pairs_hook=_without_duplicates)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{name}: not JSON, or cut off; delete it, or make it again") from error
    except ValueError as error:  # a key that is there twice, a number of thousands of digits
        raise ValueError(f"{name}: {error}; delete it, or make it again") from error
    if _is_deeper(value, DEPTH):
        raise ValueError(f"{name}: nested deeper than {DEPTH} levels; delete it, or make it again")
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} is there twice")
    return values


def _is_deeper(value: Any, depth: int) -> bool:
    """Whether lists and dicts are nested in more levels; without recursion."""
    level = [value]
    for _ in range(depth + 1):
        inner = [entry for entry in level if isinstance(entry, dict | list)]
        level = [entry for container in inner for entry in _entries(container)]
    return any(isinstance(entry, dict | list) for entry in level)


def _entries(container: dict[str, Any] | list[Any]) -> list[Any]:
    return list(container.values()) if isinstance(container, dict) else container


class BoundedLoader(yaml.SafeLoader):  # type: ignore[misc]
    """PyYAML's safe loader with bounds on depth and count, without values in themselves and keys that stand twice."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._nodes = 0
        self._sizes: dict[int, int] = {}  # nodes in a node, by its identity, once it is complete

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """As PyYAML's. Raises ComposerError beyond the bounds."""
        mark = self.peek_event().start_mark
        if self.check_event(yaml.AliasEvent):
            node = super().compose_node(parent, index)
            if id(node) not in self._sizes:
                raise yaml.composer.ComposerError(None, None, "a value contains itself", mark)
            self._count(self._sizes[id(node)], mark)
            return node
        before, self._depth = self._nodes, self._depth + 1
        self._count(1, mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        self._sizes[id(node)] = self._nodes - before
        return node

    def _count(self, nodes: int, mark: yaml.Mark) -> None:
        self._nodes += nodes
        if self._nodes > NODES or self._depth > DEPTH:
            what = f"more than {NODES} values" if self._nodes > NODES else f"nested deeper than {DEPTH} levels"
            raise yaml.composer.ComposerError(None, None, what, mark)

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        """As PyYAML's. Raises ComposerError where a key stands twice, of which PyYAML takes the last."""
        node = super().compose_mapping_node(anchor)
        seen: set[tuple[str, Any]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    what = f"the key {key.value!r} is there twice"
                    raise yaml.composer.ComposerError(None, None, what, key.start_mark)
                seen.add((key.tag, key.value))
        return node


def read_yaml(path: Path) -> Any:
    """The value of a YAML file. Raises FileNotFoundError, and ValueError for what is malformed or beyond the bounds."""
    return construct_yaml(compose_yaml(path), str(path))


def compose_yaml(path: Path) -> yaml.Node | None:
    """The nodes of a YAML file, with their lines; None of an empty one. Raises as `read_yaml` does."""
    return _compose(read_regular(path, YAML_BYTES), str(path))


def parse_yaml(text: str, name: str) -> Any:
    """The value of a YAML text. Raises ValueError, which names it by `name`."""
    return construct_yaml(_compose(text, name), name)


def _compose(text: str | bytes, name: str) -> yaml.Node | None:
    try:
        return BoundedLoader(text if isinstance(text, str) else text.decode()).get_single_node()
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{name}: not YAML ({' '.join(str(error).split())})") from error


def construct_yaml(node: yaml.Node | None, name: str) -> Any:
    """The value of a node. Raises ValueError, which names it by `name`, for a value that does not fit its tag."""
    try:
        return None if node is None else BoundedLoader("").construct_document(node)
    except MALFORMED as error:
        raise ValueError(f"{name}: not YAML ({' '.join(str(error).split())})") from error
