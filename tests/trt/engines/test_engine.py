"""Whether an engine fits this machine is said before TensorRT is asked."""

import dataclasses
import json

import pytest

from qswin.calib.files import read_sidecar, sidecar_path, write_with_sidecar
from qswin.trt.engines.cuda import Gpu
from qswin.trt.engines.engine import KIND, Built, BuiltModel, check_fits
from qswin.trt.engines.version import TensorRT, capabilities
from tests.helpers import SIDECAR

H200, L40 = Gpu("NVIDIA H200", "9.0"), Gpu("NVIDIA L40", "8.9")
TENSORRT86 = TensorRT("tensorrt", "8.6.0", capabilities("tensorrt", "8.6.0"))
RTX = TensorRT("tensorrt-rtx", "1.7.1", capabilities("tensorrt-rtx", "1.7.1"))


@pytest.fixture
def engine(tmp_path):
    path = tmp_path / "a.engine"
    built = {"target": "tensorrt", "version": "8.6.0", "profile": [1, 8, 64], "capability": "9.0"}
    write_with_sidecar(path, b"plan", KIND, SIDECAR | built)
    return path


def test_an_engine_runs_where_it_was_built_for(engine):
    check_fits(engine, BuiltModel(engine, KIND).sidecar, TENSORRT86, H200)


def test_what_does_not_fit_says_why(engine):
    sidecar = BuiltModel(engine, KIND).sidecar
    newer = TensorRT("tensorrt", "10.3.0", capabilities("tensorrt", "10.3.0"))
    with pytest.raises(ValueError, match="built by tensorrt 8.6.0, here is TensorRT 10.3.0; build it again here"):
        check_fits(engine, sidecar, newer, H200)
    with pytest.raises(ValueError, match="needs an NVIDIA GPU"):
        check_fits(engine, sidecar, TENSORRT86, None)
    with pytest.raises(ValueError, match="built for compute capability 9.0, NVIDIA L40 has 8.9"):
        check_fits(engine, sidecar, TENSORRT86, L40)
    with pytest.raises(ValueError, match="TensorRT-RTX 1.7.1 does not run on compute capability 9.0"):
        check_fits(engine, dataclasses.replace(sidecar, version="1.7.1"), RTX, H200)


REQUIRED = [field.name for field in dataclasses.fields(Built) if field.default is dataclasses.MISSING]


@pytest.mark.parametrize("key", REQUIRED)
def test_a_sidecar_without_a_key_is_refused(engine, key):
    sidecar = sidecar_path(engine)
    sidecar.write_text(
        json.dumps({name: value for name, value in json.loads(sidecar.read_text()).items() if name != key})
    )
    with pytest.raises(ValueError, match=f"not the sidecar of a engine \\('{key}' is missing\\); build it again"):
        BuiltModel(engine, KIND)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("profile", [1, 8], r"profile is \[1, 8\]: expected array of length 3, got 2"),
        ("profile", "all", "profile is 'all': expected array, got str"),
        ("profile", [0, 8, 64], r"profile\[0\] is 0: expected int >= 1"),
        ("preprocessing", {"size": [10**6, 10**6]}, r"preprocessing.size\[0\] is 1000000: expected int <= 4096"),
        ("preprocessing", {"std": [0, 1, 1]}, r"preprocessing.std\[0\] is 0: expected float > 0"),
        ("preprocessing", {"sizes": 3}, "unknown key 'sizes' in preprocessing; the keys are size, mean"),
        ("task", "detection", "task is 'detection': invalid enum value"),
        ("classes", [1], r"classes\[0\] is 1: expected str, got int"),
        ("version", 8.6, "version is 8.6: expected str, got float"),
    ],
)
def test_a_sidecar_of_other_types_is_refused_by_key_and_value(engine, key, value, words):
    sidecar = sidecar_path(engine)
    sidecar.write_text(json.dumps(json.loads(sidecar.read_text()) | {key: value}))
    with pytest.raises(ValueError, match=f"a.engine: its sidecar: {words}.*; build it again with qswin build$"):
        BuiltModel(engine, KIND)


def test_a_changed_engine_is_refused(engine):
    engine.write_bytes(b"plan B")
    with pytest.raises(ValueError, match="truncated or changed"):
        BuiltModel(engine, KIND)


def test_an_engine_and_a_package_of_one_name_keep_their_own_sidecars(engine):
    package, values = engine.with_suffix(".pt2"), json.loads(sidecar_path(engine).read_text())
    write_with_sidecar(package, b"code", "package", values | {"kind": "package", "target": "inductor"})
    assert BuiltModel(engine, KIND).backend == "tensorrt 8.6.0"
    assert BuiltModel(package, "package").backend == "inductor 8.6.0"
    with pytest.raises(ValueError, match="its kind is 'engine', not 'package'"):
        read_sidecar(engine, "package", (), "build it again")


def test_an_engine_with_a_sidecar_of_the_old_name_is_still_read(engine):
    values = json.loads(sidecar_path(engine).read_text())
    sidecar_path(engine).unlink()
    engine.with_suffix(".json").write_text(json.dumps({key: value for key, value in values.items() if key != "kind"}))
    assert BuiltModel(engine, KIND).largest == 64
