"""TensorRT's calibration caches: text files of one range a tensor.

A header, `TRT-8600-EntropyCalibration2`, then lines `tensor: 3c010a14`: the big-endian bits of the float32 scale,
amax / 127. The sidecar binds a cache to the ONNX file it was made from.
"""

import dataclasses
import math
import re
import struct
from pathlib import Path
from typing import Any

from qswin.calib.files import read_sidecar, write_with_sidecar
from qswin.calib.grid import INT8
from qswin.calib.reading import read_regular
from qswin.calib.validation import Sha256, shown, take

KIND = "calibration cache"
SUFFIX = ".cache"
LARGEST = 64 << 20  # bytes
REMEDY = "make the cache again with qswin calib-cache"
ALGORITHMS = {"entropy2": "EntropyCalibration2", "minmax": "MinMaxCalibration"}
VERSION = re.compile(r"[0-9]{1,3}\.[0-9]{1,3}\.[0-9]{1,3}(\.|$)")
HEADER = re.compile(r"TRT-(\d+)-(\w+)")
LINE = re.compile(r"(.+): ([0-9a-f]{8}|0)")  # TensorRT leaves leading zeros out: a scale of 0 is "0"


@dataclasses.dataclass(frozen=True)
class BoundTo:
    """Of a cache's sidecar: the ONNX file that the cache was made from, its name and its SHA-256."""

    onnx: str
    onnx_sha256: Sha256


def version_number(version: str) -> str:
    """TensorRT's version as its caches write it: "8600" of "8.6.0", "100300" of "10.3.0".

    Raises:
        ValueError: it does not begin with three numbers.
    """
    if not VERSION.match(version):
        raise ValueError(f"TensorRT's version {shown(version)} is not one; give three numbers, such as 8.6.0")
    major, minor, patch = (int(part) for part in version.split(".")[:3])
    return f"{major}{minor}{patch:02d}" if major < 10 else f"{major}{minor:02d}{patch:02d}"


def format_cache(ranges: dict[str, float], version: str, algorithm: str) -> bytes:
    """A cache file's bytes.

    Args:
        ranges: {tensor: amax}.
        version: TensorRT's, "8.6.0".
        algorithm: entropy2 or minmax.

    Raises:
        ValueError: a range is not positive and finite; the tensor is named.
    """
    for tensor, amax in ranges.items():
        if not 0 < amax < math.inf:
            raise ValueError(f"{tensor}: its range is {amax}; TensorRT needs a positive, finite one")
    lines = [f"{tensor}: {struct.pack('>f', amax / INT8.qmax).hex()}\n" for tensor, amax in ranges.items()]
    return "".join([f"TRT-{version_number(version)}-{ALGORITHMS[algorithm]}\n", *lines]).encode()


def parse_cache(data: bytes, name: str = "cache") -> tuple[str, str, dict[str, float]]:
    """Reads a cache file's bytes.

    Returns:
        TensorRT's version as the header writes it ("8600"), the algorithm's name there, and {tensor: amax}.

    Raises:
        ValueError: the header or a line is malformed (its number is given), or a scale is negative, NaN or infinite.
    """
    try:
        lines = data.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: not a calibration cache: it is not text") from error
    header = HEADER.fullmatch(lines[0])
    if header is None or header[2] not in ALGORITHMS.values():
        raise ValueError(f"{name}, line 1: not a calibration cache's header; it reads {lines[0][:60]!r}")
    if lines[-1] != "":
        raise ValueError(f"{name}, line {len(lines)}: cut off; make the cache again")
    ranges: dict[str, float] = {}
    for number, line in enumerate(lines[1:-1], start=2):
        entry = LINE.fullmatch(line)
        if entry is None or entry[1] in ranges:
            raise ValueError(f"{name}, line {number}: not `tensor: 8 hex digits`, or there twice; make the cache again")
        (scale,) = struct.unpack(">f", bytes.fromhex(entry[2].zfill(8)))
        if not 0 <= scale < math.inf:
            raise ValueError(f"{name}, line {number}: the scale of {entry[1]} is {scale}; make the cache again")
        ranges[entry[1]] = INT8.qmax * scale
    return header[1], header[2], ranges


def write_cache(path: Path, data: bytes, bound: BoundTo, details: dict[str, Any]) -> None:
    """Writes a cache and the sidecar that binds it to its ONNX file, each atomically, the sidecar last.

    Raises:
        ValueError: the data is malformed, or the sidecar's name belongs to a file of another kind.
    """
    parse_cache(data, str(path))
    write_with_sidecar(path, data, KIND, {**details, **dataclasses.asdict(bound)})


def read_cache(path: Path, version: str, onnx_sha256: str) -> bytes:
    """The content of a cache that was made for this TensorRT and this ONNX file; see `parse_cache`.

    Args:
        version: TensorRT's, "8.6.0".
        onnx_sha256: of the ONNX file that is about to be built.

    Raises:
        FileNotFoundError: the cache or its sidecar is missing.
        ValueError: it is malformed, of another version, or of another ONNX file.
    """
    data = read_regular(path, LARGEST) if path.is_file() else b""
    bound = take(read_sidecar(path, KIND, (), REMEDY, data), BoundTo, f"{path}: its sidecar", REMEDY)
    made_by, _, _ = parse_cache(data, str(path))
    if made_by != version_number(version):
        raise ValueError(
            f"{path}: made for TensorRT {made_by}, here is {version_number(version)}; make the cache again"
        )
    if bound.onnx_sha256 != onnx_sha256:
        raise ValueError(f"{path}: stale: made for another ONNX file, {bound.onnx}; make the cache again")
    return data
