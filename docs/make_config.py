"""Writes docs/config.md, every key of a config, from the schema: python docs/make_config.py"""

import dataclasses
import types
import typing
from pathlib import Path
from typing import Any

from qswin.qat.schema import MISSING, RENAMED, Config, Key, keys_of

PAGE = Path(__file__).with_name("config.md")
HEAD = """# Config

Written by `python docs/make_config.py` from the schema, `qat/schema.py`. `qswin calibrate`, `train` and `convert` read
one YAML file, `--config FILE`; `key=value` on the command line comes over it: `train.lr=1e-4`. Examples are in
`configs/`.
"""


def type_name(kind: Any) -> str:
    """As YAML's users would say it."""
    if isinstance(kind, types.UnionType):
        return " or ".join(type_name(part) for part in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return f"[{', '.join(type_name(part) for part in typing.get_args(kind))}]"
    if typing.get_origin(kind) is dict:
        return "mapping"
    return {str: "text", int: "integer", float: "number", bool: "true or false", type(None): "null", Any: "any"}[kind]


def allowed(key: Key) -> str:
    """What values the type lets through and the schema allows; "" is all of them."""
    if key.choices:
        return f" One of {', '.join(f'`{choice}`' for choice in key.choices)}."
    bounds = [
        f"{word} {bound:g}" for word, bound in (("at least", key.least), ("at most", key.most)) if bound is not None
    ]
    return f" {' and '.join(bounds).capitalize()}." if bounds else ""


def default(value: Any) -> str:
    if value == MISSING:
        return "must be given"
    words = {None: "null", True: "true", False: "false"}
    if isinstance(value, tuple):
        return f"`[{', '.join(map(str, value))}]`"
    return f"`{words[value] if value is None or isinstance(value, bool) else value}`"


def table(keys: list[Key]) -> str:
    rows = [
        f"| `{key.name}` | {type_name(key.type)} | {default(key.default)} | {key.help}{allowed(key)} |" for key in keys
    ]
    return "\n".join(["| key | type | default | |", "| --- | --- | --- | --- |", *rows])


def sections(schema: Any, name: str = "") -> dict[str, Any]:
    """{name: schema} of a schema, which stands first, and of all sections in it."""
    found = {name: schema}
    for field in dataclasses.fields(schema):
        if dataclasses.is_dataclass(field.type):
            found |= sections(field.type, f"{name}.{field.name}".lstrip("."))
    return found


def section(name: str, schema: Any) -> str:
    keys = [key for key in keys_of().values() if key.name.rpartition(".")[0] == name]
    return f"## {name or 'Outside the sections'}\n\n{schema.__doc__}\n\n{table(keys)}\n"


def page() -> str:
    """The whole page."""
    old = "\n".join(f"| `{old}` | `{new}` |" for old, new in RENAMED.items())
    renamed = f"## Old names\n\nThey are still read, with a warning.\n\n| old | now |\n| --- | --- |\n{old}\n"
    return "\n".join([HEAD, *(section(*item) for item in sections(Config).items()), renamed])


if __name__ == "__main__":
    PAGE.write_text(page())
