"""One check of everything that is read from a file: the types and ranges that a dataclass declares, by msgspec.

A sidecar, a recipe, an ONNX file's metadata or a result is plain data of JSON or YAML. `validate` makes the dataclass
that it must be of it, or says in one line which file and key is wrong, what was found there and what is wanted.
"""

import dataclasses
import functools
import re
import sys
from collections.abc import Collection, Iterator, Mapping
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, inspect

T = TypeVar("T")
FLOAT32_MAX = 3.4e38  # what is larger would be infinite as a weight or a range
Positive = Annotated[float, Meta(gt=0, le=FLOAT32_MAX)]
NotNegative = Annotated[float, Meta(ge=0, le=FLOAT32_MAX)]
Number = Annotated[float, Meta(ge=-FLOAT32_MAX, le=FLOAT32_MAX)]  # neither NaN nor infinite
Count = Annotated[int, Meta(ge=1, le=sys.maxsize)]
Name = Annotated[str, Meta(min_length=1)]
Sha256 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
Task = Literal["classification", "segmentation", "features"]  # the last of backbones
LONGEST = 60  # characters of a value that a message repeats
AT = re.compile(r"(?s)(?P<what>.*?)(?: - at `(?:key` in `)?\$(?P<path>[^`]*)`)?$")  # the form of msgspec's messages
STEP = re.compile(r"\.([^.\[]+)|\[(\d+)\]|\[\.\.\.\]")  # of a path: .key, [index], or some key of a mapping


def validate(values: Any, schema: type[T], where: str, beside: Collection[str] = (), remedy: str = "") -> T:
    """The dataclass that plain data stand for. Nothing is converted but lists to tuples and integers to floats.

    Args:
        schema: a dataclass; types may be Annotated with msgspec's `Meta`, as those of this module are.
        where: the file, or what else the data come from; the message begins with it.
        beside: keys, besides the fields of `schema`, that the data may have. Any other is refused.
        remedy: what to do about it; the end of the message.

    Raises:
        ValueError: a key is missing or unknown, or a value is of another type or outside its range.
    """
    end = f"; {remedy}" if remedy else ""
    if isinstance(values, Mapping):
        values = {key: value for key, value in values.items() if key not in beside}
    try:
        converted = msgspec.convert(values, schema, strict=True)
    except msgspec.ValidationError as error:
        raise ValueError(f"{where}: {_explain(str(error), values)}{end}") from error
    for message in _unknown_keys(values, _info(schema), ""):  # type: ignore[arg-type]  # types are hashable
        raise ValueError(f"{where}: {message}{end}")
    return converted


def take(values: Mapping[str, Any], schema: type[T], where: str, remedy: str = "") -> T:
    """`validate` of those keys that are fields of `schema`: of a file that says more than its reader asks for."""
    names = [field.name for field in dataclasses.fields(schema)]  # type: ignore[arg-type]
    return validate({name: values[name] for name in names if name in values}, schema, where, remedy=remedy)


def shown(value: Any) -> str:
    """A value as a message repeats it: its start where it is long."""
    text = repr(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def _explain(message: str, values: Any) -> str:
    """`rules[0].amax is -1.0: expected float > 0.0` of msgspec's "Expected `float` > 0.0 - at `$.rules[0].amax`"."""
    match = AT.fullmatch(message)
    assert match is not None
    what, path = match["what"].replace("`", ""), (match["path"] or "").lstrip(".")
    if missing := re.fullmatch("Object missing required field (.*)", what):
        return f"{missing[1]!r} is missing" + (f" in {path}" if path else "")
    if not what.startswith(("Expected", "Invalid", "Number")):  # of a __post_init__, which says what it found
        return f"{path}: {what}" if path else what
    found = _at(values, match["path"] or "")
    return f"{path or 'the whole'}{'' if found is None else f' is {found}'}: {what[0].lower()}{what[1:]}"


def _at(values: Any, path: str) -> str | None:
    """The value at a path, as it is shown; None where the path does not name its keys."""
    for key, index in STEP.findall(path):
        if not (key or index):
            return None
        values = values[key] if key else values[int(index)]
    return shown(values)


@functools.cache
def _info(schema: Any) -> inspect.Type:
    return inspect.type_info(schema)


def _unknown_keys(values: Any, info: inspect.Type, path: str) -> Iterator[str]:
    """A message for each key that no dataclass has a field for; msgspec itself passes over them."""
    match info:
        case inspect.DataclassType(fields=fields) if isinstance(values, Mapping):
            types = {field.encode_name: field.type for field in fields}
            for key, value in values.items():
                if key not in types:
                    yield f"unknown key {shown(key)}{f' in {path}' if path else ''}; the keys are {', '.join(types)}"
                else:
                    yield from _unknown_keys(value, types[key], f"{path}.{key}".lstrip("."))
        case inspect.UnionType(types=kinds):
            for kind in kinds:
                yield from _unknown_keys(values, kind, path)
        case inspect.VarTupleType(item_type=kind) | inspect.ListType(item_type=kind) if isinstance(
            values, list | tuple
        ):
            for index, value in enumerate(values):
                yield from _unknown_keys(value, kind, f"{path}[{index}]")
