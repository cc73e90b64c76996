"""The check of everything that is read from a file: types, ranges and keys, and what its one line says."""

import dataclasses
import json
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Meta

from qswin.calib.validation import Count, NotNegative, Number, Positive, take, validate


@dataclasses.dataclass(frozen=True)
class Part:
    name: str
    scale: Positive | None = None

    def __post_init__(self) -> None:
        if self.name == "odd":
            raise ValueError("name 'odd' is odd")


@dataclasses.dataclass(frozen=True)
class Whole:
    kind: Literal["a", "b"]
    parts: tuple[Part, ...] = ()
    size: tuple[Count, Count] = (1, 1)
    share: Annotated[float, Meta(ge=0, le=1)] = 0.5
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    free: dict[str, Any] = dataclasses.field(default_factory=dict)
    part: Part | None = None
    weight: NotNegative = 0.0
    number: Number = 0.0


def test_plain_data_become_the_dataclass():
    values = {"kind": "a", "parts": [{"name": "x", "scale": 2}], "size": [3, 4], "free": {"any": [1, {"thing": None}]}}
    assert validate(values, Whole, "f") == Whole("a", (Part("x", 2.0),), (3, 4), free={"any": [1, {"thing": None}]})


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "f.json: 'kind' is missing"),
        ({"kind": "c"}, "f.json: kind is 'c': invalid enum value 'c'"),
        ({"kind": "a", "parts": 3}, "f.json: parts is 3: expected array, got int"),
        ({"kind": "a", "parts": [{"name": "x"}, {}]}, "f.json: 'name' is missing in parts[1]"),
        ({"kind": "a", "parts": [{"name": "x", "scale": -1}]}, "f.json: parts[0].scale is -1: expected float > 0.0"),
        ({"kind": "a", "parts": [{"name": "odd"}]}, "f.json: parts[0]: name 'odd' is odd"),
        (
            {"kind": "a", "parts": [{"name": "x", "sale": 1}]},
            "unknown key 'sale' in parts[0]; the keys are name, scale",
        ),
        (
            {"kind": "a", "part": {"name": "x", "sale": 1}},
            "f.json: unknown key 'sale' in part; the keys are name, scale",
        ),
        ({"kind": "a", "other": 1}, "f.json: unknown key 'other'; the keys are kind, parts"),
        ({"kind": "a", "size": [3, 0]}, "f.json: size[1] is 0: expected int >= 1"),
        ({"kind": "a", "size": [3, True]}, "f.json: size[1] is True: expected int, got bool"),
        ({"kind": "a", "size": [3, 10**400]}, "f.json: size[1] is 1000"),
        ({"kind": "a", "share": "0.5"}, "f.json: share is '0.5': expected float, got str"),
        ({"kind": "a", "share": 10**400}, "f.json: share is 1000"),
        ({"kind": "a", "share": float("nan")}, "f.json: share is nan: expected float >= 0.0"),
        ({"kind": "a", "weight": float("inf")}, "f.json: weight is inf: expected float <= "),
        ({"kind": "a", "number": float("-inf")}, "f.json: number is -inf: expected float >= "),
        ({"kind": "a", "number": float("nan")}, "f.json: number is nan: expected float >= "),
        ({"kind": "a", "metrics": {"acc": "high"}}, "f.json: metrics[...]: expected float, got str"),
        ({"kind": "a", "metrics": {1: 1.0}}, "f.json: metrics"),
        ({3: 4}, "f.json: "),
        ([], "f.json: the whole is []: expected object, got array"),
        (None, "f.json: the whole is None: expected object, got null"),
        ({"kind": "x" * 1000}, "f.json: kind is 'xxxxx"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_that_ends_with_the_remedy(values, words):
    with pytest.raises(ValueError) as error:
        validate(values, Whole, "f.json", remedy="save it again")
    message = str(error.value)
    assert words in message and message.endswith("; save it again") and "\n" not in message and len(message) < 1300


def test_a_reader_may_take_a_part_of_what_a_file_says():
    values = {"kind": "a", "share": 1, "more": [1], "sha256": "0"}
    assert take(values, Whole, "f") == Whole("a", share=1.0)
    assert validate({"kind": "a", "sha256": "0"}, Whole, "f", beside=("sha256",)) == Whole("a")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner) | st.dictionaries(st.sampled_from(["kind", "parts", "name", "size"]) | st.text(), inner)
    ),
)


@given(json_values)
def test_any_json_is_the_dataclass_or_a_value_error(values):
    try:
        assert isinstance(validate(json.loads(json.dumps(values)), Whole, "f"), Whole)
    except ValueError as error:
        assert str(error).startswith("f: ")
