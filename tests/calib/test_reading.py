"""What is read ends, soon, and a refusal names the file."""

import json
import os
import time

import pytest
import yaml

from qswin.calib import reading
from qswin.calib.reading import parse_json, parse_yaml, read_json, read_regular, read_yaml

BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = "a: &a {k: 1, l: 2}\n" + "".join(
    f"{name}: &{name} {{<<: [{', '.join([f'*{before}'] * 10)}], {name}: 1}}\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.fixture
def soon():
    """Bounds that hold are fast; a machine under load still gets ten seconds."""
    start = time.monotonic()
    yield
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BOMB, "more than 20000 values"),
        (MERGES, "more than 20000 values"),
        ("a: &a [*a]", "a value contains itself"),
        ("&a {b: {c: *a}}", "a value contains itself"),
        ("[" * 100_000, "deeper than 64 levels"),
        ("{a: " * 100_000, "deeper than 64 levels"),
        ("- " * 100_000, "deeper than 64 levels"),
        ("? " * 100_000, "deeper than 64 levels"),
        ("\n".join(" " * depth + "a:" for depth in range(100)), "deeper than 64 levels"),
        ("rules:\n" + "- {sites: fc1, quantize: true}\n" * 10**4, "more than 20000 values"),
        ("a: 1\nb: 2\na: 3", "the key 'a' is there twice.*line 3"),
        ("{a: {b: 1, 'b': 2}}", "the key 'b' is there twice"),
        ("a: 2001-99-99", "month must be in"),
        ("a: !!int ''", "not YAML"),
        ("a: !!timestamp x", "not YAML"),
        ("a: !!bool x", "not YAML"),
        ("a: " + "9" * 5000, "not YAML"),
        ("a: !!python/object/apply:os.getpid []", "could not determine a constructor"),
        ("a: [", "not YAML"),
        ("a: \x00", "not YAML"),
        ("[a]: 1\n? {b: 1}\n: 2", "unhashable key"),
    ],
)
def test_yaml_is_bounded(tmp_path, soon, text, words):
    file = tmp_path / "a.yaml"
    file.write_text(text)
    for read in (lambda: read_yaml(file), lambda: parse_yaml(text, str(file))):
        with pytest.raises(
            ValueError, match=rf"a\.yaml: not YAML \(.*{words}" if words != "not YAML" else r"a\.yaml: not"
        ):
            read()


@pytest.mark.parametrize(
    "text",
    [
        "base: &base {lr: 1, wd: 2}\nother: {<<: *base, lr: 3}\nlist: [*base, *base]",
        "a: [1, 1.5, true, null, '1', 2001-01-01]\nb:\n- c: {d: [e]}",
        "",
        "[" * 60 + "]" * 60,
    ],
)
def test_yaml_within_the_bounds_is_as_pyyaml_reads_it(text):
    assert parse_yaml(text, "x") == yaml.safe_load(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100_000, "not JSON, or cut off"),
        ("[" * 100 + "]" * 100, "nested deeper than 64 levels"),
        ('{"a":' * 70 + "1" + "}" * 70, "nested deeper than 64 levels"),
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' is there twice"),
        ("9" * 5000, "limit"),
        ('{"a": 1', "not JSON, or cut off"),
        (b"\xff\xfe\xfa", "not JSON, or cut off"),
    ],
)
def test_json_is_bounded(soon, text, words):
    with pytest.raises(ValueError, match=f"^r.json: .*{words}.*; delete it, or make it again"):
        parse_json(text, "r.json")


def test_json_at_the_bound_is_read():
    assert parse_json("[" * 64 + "]" * 64, "x") == json.loads("[" * 64 + "]" * 64)


@pytest.mark.parametrize("read", [read_json, read_yaml])
def test_only_regular_files_of_a_bounded_size_are_read(tmp_path, monkeypatch, read):
    os.mkfifo(fifo := tmp_path / "fifo")
    for path in (fifo, tmp_path, "/dev/zero"):
        with pytest.raises(ValueError, match=f"^{path}: cannot be read .not a regular file"):
            read(path)
    with pytest.raises(FileNotFoundError, match="missing: no such file"):
        read(tmp_path / "missing")
    for name in ("JSON_BYTES", "YAML_BYTES"):
        monkeypatch.setattr(reading, name, 1 << 10)
    (large := tmp_path / "large").write_text(" " * 1025)
    with pytest.raises(ValueError, match="large: larger than 0.000976562 MiB"):
        read(large)
    assert read_regular(large, 1025) == b" " * 1025
