"""Whether an engine fits this machine is said before TensorRT is asked."""

import json

import pytest

from qswin.calib.files import sha256
from qswin.trt.engines.cuda import Gpu
from qswin.trt.engines.engine import KEYS, check_fits, read_sidecar
from qswin.trt.engines.version import Backend, capabilities
from tests.helpers import SIDECAR

H200, L40 = Gpu("NVIDIA H200", "9.0"), Gpu("NVIDIA L40", "8.9")
TENSORRT = Backend("tensorrt", "8.6.0", capabilities("tensorrt", "8.6.0"))
RTX = Backend("tensorrt-rtx", "1.7.1", capabilities("tensorrt-rtx", "1.7.1"))


@pytest.fixture
def engine(tmp_path):
    path = tmp_path / "a.engine"
    path.write_bytes(b"plan")
    built = {"target": "tensorrt", "version": "8.6.0", "profile": [1, 8, 64], "capability": "9.0"}
    path.with_suffix(".json").write_text(json.dumps(SIDECAR | built | {"sha256": sha256(path)}))
    return path


def test_an_engine_runs_where_it_was_built_for(engine):
    check_fits(engine, read_sidecar(engine), TENSORRT, H200)


def test_what_does_not_fit_says_why(engine):
    sidecar = read_sidecar(engine)
    newer = Backend("tensorrt", "10.3.0", capabilities("tensorrt", "10.3.0"))
    with pytest.raises(ValueError, match="built by tensorrt 8.6.0, here is TensorRT 10.3.0; build it again here"):
        check_fits(engine, sidecar, newer, H200)
    with pytest.raises(ValueError, match="needs an NVIDIA GPU"):
        check_fits(engine, sidecar, TENSORRT, None)
    with pytest.raises(ValueError, match="built for compute capability 9.0, NVIDIA L40 has 8.9"):
        check_fits(engine, sidecar, TENSORRT, L40)
    with pytest.raises(ValueError, match="TensorRT-RTX 1.7.1 does not run on compute capability 9.0"):
        check_fits(engine, {**sidecar, "version": "1.7.1"}, RTX, H200)


@pytest.mark.parametrize("key", KEYS)
def test_a_sidecar_without_a_key_is_refused(engine, key):
    sidecar = engine.with_suffix(".json")
    sidecar.write_text(json.dumps({name: value for name, value in json.loads(sidecar.read_text()).items() if name != key}))
    with pytest.raises(ValueError, match=f"not an engine's sidecar \\('{key}'\\)"):
        read_sidecar(engine)


def test_sidecars_are_checked(engine):
    engine.write_bytes(b"plan B")
    with pytest.raises(ValueError, match="truncated or changed"):
        read_sidecar(engine)
    engine.with_suffix(".json").write_text('{"sha256": 1}')
    with pytest.raises(ValueError, match="not an engine's sidecar"):
        read_sidecar(engine)
    engine.with_suffix(".json").unlink()
    with pytest.raises(FileNotFoundError, match=r"a\.json: no such file"):
        read_sidecar(engine)
