"""The file of calibration's histograms: what is written comes back, and nothing else is taken."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from qswin.calib.calibrators import BINS
from qswin.calib.histogram_file import Observation, load_histograms, save_histograms
from tests.helpers import filled

VALUES = npst.arrays(np.float32, st.integers(1, 50), elements=st.floats(-(2.0**127), 2.0**127, width=32))


def observed(values, bits=8):
    return Observation(filled(values), f"int{bits}")


@settings(max_examples=30)
@given(st.lists(st.tuples(VALUES.filter(np.any), st.integers(2, 8)), max_size=4))
def test_histograms_come_back(drawn):
    before = {f"layers.{i}._input_quantizer": observed(values, bits) for i, (values, bits) in enumerate(drawn)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.npz"
        save_histograms(path, before)
        after = load_histograms(path)
    assert list(after) == list(before)
    for name, observation in before.items():
        assert after[name].format == observation.format
        for attribute in ("amax", "exponent", "bin_width"):
            assert getattr(after[name].histogram, attribute) == getattr(observation.histogram, attribute)
        assert np.array_equal(after[name].histogram.counts, observation.histogram.counts)


def columns():
    histogram = filled(np.float32([1.5, -3.0]))
    return {
        "names": np.array(["fc1"]),
        "formats": np.array(["int8"]),
        "amax": np.array([histogram.amax]),
        "counts": histogram.counts[None],
    }


def test_these_columns_are_taken(tmp_path):
    np.savez(tmp_path / "a.npz", **columns())
    assert load_histograms(tmp_path / "a.npz")["fc1"].histogram.amax == 3.0


@pytest.mark.parametrize(
    ("bits", "name"),
    [
        (np.array([4]), "int4"),
        (np.array([9]), None),
        (np.array([8, 8]), None),
        (np.array([8.5]), None),
        (np.array(8), None),
    ],
)
def test_files_with_bits_instead_of_formats_are_read(tmp_path, bits, name):
    old = {key: value for key, value in columns().items() if key != "formats"} | {"bits": bits}
    np.savez(tmp_path / "a.npz", **old)
    if name is None:
        with pytest.raises(ValueError, match=r"a\.npz: .*calibrate again"):
            load_histograms(tmp_path / "a.npz")
    else:
        assert load_histograms(tmp_path / "a.npz")["fc1"].format == name


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("names", np.array([["fc1"]])),
        ("names", np.array(["fc1"], dtype=object)),
        ("formats", np.array(["int9"])),
        ("formats", np.array(["int8", "int8"])),
        ("formats", np.array([8])),
        ("amax", np.array([np.nan])),
        ("amax", np.array([0.0])),
        ("amax", np.array([4.0])),
        ("amax", np.array([np.inf])),
        ("amax", np.array([2.9])),
        ("counts", np.zeros((1, BINS - 1), dtype=np.int64)),
        ("counts", np.full((1, BINS), -1)),
        ("counts", np.zeros((1, BINS))),
        ("counts", np.zeros((1, BINS), dtype=np.int64)),
    ],
)
def test_other_columns_are_refused(tmp_path, column, value):
    np.savez(tmp_path / "a.npz", **columns() | {column: value})
    with pytest.raises(ValueError, match=r"a\.npz: .*calibrate again"):
        load_histograms(tmp_path / "a.npz")


@settings(max_examples=30)
@given(st.data())
def test_broken_files_are_refused(data):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.npz"
        save_histograms(path, {"fc1": observed(np.float32([1, 2]))})
        whole = path.read_bytes()
        path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
        with pytest.raises(ValueError, match="calibrate again"):
            load_histograms(path)


@settings(max_examples=100)
@given(st.randoms(use_true_random=False))
def test_damaged_files_are_read_or_refused(random):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.npz"
        save_histograms(path, {"fc1": observed(np.float32([1, 2]))})
        content = bytearray(path.read_bytes())
        for _ in range(random.choice([1, 1, 2, 5])):
            content[random.randrange(len(content))] = random.randrange(256)
        path.write_bytes(content)
        try:
            (observation,) = load_histograms(path).values()
        except ValueError as error:
            assert "calibrate again" in str(error)
        else:
            assert observation.histogram.counts.sum() == 2


def test_a_missing_column_and_a_missing_file(tmp_path):
    np.savez(tmp_path / "a.npz", names=np.array(["fc1"]))
    with pytest.raises(ValueError, match=r"a\.npz: truncated, or not a file of histograms"):
        load_histograms(tmp_path / "a.npz")
    with pytest.raises(FileNotFoundError):
        load_histograms(tmp_path / "b.npz")
