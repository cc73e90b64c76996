"""Calibration caches: TensorRT's format, bit for bit, and every reason to refuse one."""

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qswin.calib.files import sidecar_path
from qswin.calib.trt_cache.cache_file import (
    BoundTo,
    format_cache,
    parse_cache,
    read_cache,
    version_number,
    write_cache,
)

NAMES = st.text(st.characters(codec="ascii", exclude_characters="\n", min_codepoint=32), min_size=1, max_size=40)
RANGES = st.dictionaries(NAMES, st.floats(2.0**-100, 2.0**100, width=32), max_size=20)


def test_a_scale_is_the_bits_of_amax_over_127():
    assert format_cache({"x": 127.0, "y z": 254.0}, "8.6.0", "entropy2") == (
        b"TRT-8600-EntropyCalibration2\nx: 3f800000\ny z: 40000000\n"
    )


@pytest.mark.parametrize(("version", "written"), [("8.6.0", "8600"), ("8.6.1.6", "8601"), ("10.3.0", "100300")])
def test_versions_are_written_as_tensorrt_does(version, written):
    assert version_number(version) == written


@given(RANGES, st.sampled_from(["entropy2", "minmax"]))
def test_what_is_written_is_read(ranges, algorithm):
    version, name, read = parse_cache(format_cache(ranges, "8.6.0", algorithm))
    assert version == "8600" and name == {"entropy2": "EntropyCalibration2", "minmax": "MinMaxCalibration"}[algorithm]
    assert list(read) == list(ranges)
    np.testing.assert_allclose(list(read.values()), list(ranges.values()), rtol=1e-6)


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused_in_words(data):
    try:
        parse_cache(data)
    except ValueError as error:
        assert "cache" in str(error)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: not a calibration cache's header"),
        ("TRT-8600-Other\n", "line 1"),
        ("TRT-8600-EntropyCalibration2\nx: 3f80000\n", "line 2: not `tensor: 8 hex digits`"),
        ("TRT-8600-EntropyCalibration2\nx: 3f800000\nx: 3f800000\n", "line 3"),
        ("TRT-8600-EntropyCalibration2\nx: 3f800000\ny: 3f80", "line 3: cut off"),
        ("TRT-8600-EntropyCalibration2\nx: bf800000\n", "the scale of x is -1.0"),
        ("TRT-8600-EntropyCalibration2\nx: 7fc00000\n", "the scale of x is nan"),
    ],
)
def test_malformed_caches_name_the_line(text, message):
    with pytest.raises(ValueError, match=message):
        parse_cache(text.encode())


def test_a_scale_of_zero_is_one_digit():
    """What TensorRT 8.6 writes for a LayerNormalization's bias that is 0."""
    _, _, ranges = parse_cache(b"TRT-8600-MinMaxCalibration\n(Unnamed Layer* 3) [Constant]_output: 0\nx: 3c010204\n")
    assert ranges["(Unnamed Layer* 3) [Constant]_output"] == 0 and ranges["x"] == pytest.approx(1.0)


def test_ranges_must_be_ranges():
    with pytest.raises(ValueError, match="dead: its range is 0"):
        format_cache({"dead": 0.0}, "8.6.0", "minmax")


@pytest.fixture
def cache(tmp_path):
    path, checksum = tmp_path / "a.cache", hashlib.sha256(b"graph").hexdigest()
    write_cache(path, format_cache({"input": 2.0}, "8.6.0", "entropy2"), BoundTo("a.onnx", checksum), {"images": 4})
    return path, checksum


def test_a_fitting_cache_is_read(cache):
    path, checksum = cache
    assert parse_cache(read_cache(path, "8.6.0", checksum))[2]["input"] == pytest.approx(2.0)


def test_caches_that_do_not_fit_are_refused_with_the_reason(cache):
    path, checksum = cache
    with pytest.raises(ValueError, match="made for TensorRT 8600, here is 8601"):
        read_cache(path, "8.6.1", checksum)
    with pytest.raises(ValueError, match=r"stale: made for another ONNX file, a\.onnx"):
        read_cache(path, "8.6.0", "0" * 64)
    path.write_bytes(path.read_bytes() + b"y: 3f800000\n")
    with pytest.raises(ValueError, match="changed since its sidecar"):
        read_cache(path, "8.6.0", checksum)
    sidecar_path(path).write_text("[]")
    with pytest.raises(ValueError, match="not a JSON object"):
        read_cache(path, "8.6.0", checksum)
    sidecar_path(path).unlink()
    with pytest.raises(FileNotFoundError, match="its sidecar a.cache.json is missing; make the cache again"):
        read_cache(path, "8.6.0", checksum)
    with pytest.raises(FileNotFoundError, match="no such calibration cache"):
        read_cache(path.with_name("b.cache"), "8.6.0", checksum)
