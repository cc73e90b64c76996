"""Numbers of flags: bounds hold before a file is opened, and the line names the flag."""

import argparse

import pytest

from qswin.qat.commands.arguments import above_zero, count, positive, workers
from tests.helpers import invoke


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (count, {"0": 0, "7": 7}, ("-1", "1.5", "x", "", "1000000001", "9" * 5000)),
        (positive, {"1": 1, "64": 64}, ("0", "-3", "nan")),
        (workers, {"0": 0, "1024": 1024}, ("-1", "1025")),
        (above_zero, {"0.5": 0.5, "3": 3.0}, ("0", "-1", "nan", "inf", "1e300", "x")),
    ],
)
def test_numbers_have_bounds(kind, good, bad):
    assert {text: kind(text) for text in good} == good
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match="is not a"):
            kind(text)


@pytest.mark.parametrize("flags", [("--batch-size", "0"), ("--workers", "-1"), ("--timeout", "0"), ("--images", "x")])
def test_the_line_names_the_flag(flags, capsys):
    assert invoke("evaluate", "--model", "missing.onnx", "--data", "missing", *flags) == 2
    assert f"argument {flags[0]}: {flags[1]!r} is not a" in capsys.readouterr().err.splitlines()[-1]
