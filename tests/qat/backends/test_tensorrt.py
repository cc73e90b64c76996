"""`qswin build` of an engine from a bundle, without a GPU: what its sidecar says, and what is refused."""

import json

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from qswin.calib.files import sha256  # noqa: E402
from qswin.qat.backends import tensorrt as backend  # noqa: E402
from qswin.qat.bundle.format import write_bundle  # noqa: E402
from qswin.trt.engines.cuda import Gpu  # noqa: E402
from qswin.trt.engines.engine import KIND, BuiltModel  # noqa: E402
from qswin.trt.engines.version import TensorRT, capabilities  # noqa: E402
from tests.helpers import fails, invoke  # noqa: E402
from tests.qat.bundle.small import make_bundle  # noqa: E402

TENSORRT86 = TensorRT("tensorrt", "8.6.0", capabilities("tensorrt", "8.6.0"))


@pytest.fixture
def bundle(tmp_path):
    (tmp_path / "x.qsb").write_bytes(write_bundle(make_bundle().bundle))
    return tmp_path / "x.qsb"


def test_the_sidecar_says_what_the_engine_is(bundle, tmp_path, monkeypatch):
    asked = []

    def build(path, model, options):
        asked.append((path, model, options))
        return b"plan", (1, 1, 4), TENSORRT86

    monkeypatch.setattr(backend, "build_plugin_engine", build)
    monkeypatch.setattr(backend, "find_gpu", lambda: Gpu("NVIDIA H200", "9.0"))
    engine, library = tmp_path / "y.engine", tmp_path / "libqswin_trt.so"
    assert invoke("build", "--bundle", bundle, "--plugin", library, "--engine", engine, "--batch-sizes", "1,1,4") == 0
    ((path, model, options),) = asked
    assert path == bundle and model.data == bundle.read_bytes() and model.image == (3, 32, 32)
    assert model.batch_sizes == (1, 4) and options.plugin == library and options.batch_sizes == (1, 1, 4)
    built = BuiltModel(engine, KIND)
    assert built.batch_sizes == (1, 4) and built.sidecar.plugin == "libqswin_trt.so" and built.precision == "int8"
    sidecar = json.loads((tmp_path / "y.engine.json").read_text())
    assert sidecar["bundle"] == "x.qsb" and sidecar["bundle_sha256"] == sha256(bundle)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bundle", "x.qsb"], "--bundle needs --plugin FILE, libqswin_trt.so of cpp/"),
        (["--bundle", "x.qsb", "--onnx", "x.onnx"], "--bundle is not for --target tensorrt with --onnx"),
        (
            ["--bundle", "x.qsb", "--plugin", "x.so", "--level", "0"],
            "--level is not for --target tensorrt with --bundle",
        ),
        (["--onnx", "x.onnx", "--plugin", "x.so"], "--plugin is not for --target tensorrt with --onnx"),
        (["--bundle", "x.qsb", "--plugin", "x.so", "--target", "bundle"], "--bundle is not for --target bundle"),
        (["--bundle", "x.qsb", "--plugin", "x.so", "--target", "tensorrt-rtx"], "which has no such plugins"),
        (["--plugin", "x.so"], "--target tensorrt builds from --onnx FILE or --bundle FILE, which is not given"),
        (["--bundle", "x.qsb", "--plugin", "x.so"], "x.qsb"),
    ],
)
def test_what_does_not_go_together_is_refused(arguments, message, tmp_path, capsys):
    assert message in fails(capsys, "build", "--engine", tmp_path / "y.engine", *arguments)


def test_a_file_that_is_no_bundle_is_refused(bundle, tmp_path, capsys):
    bundle.write_bytes(bundle.read_bytes()[:-1])
    options = ("--plugin", tmp_path / "libqswin_trt.so", "--engine", tmp_path / "y.engine")
    assert "cut off, or changed" in fails(capsys, "build", "--bundle", bundle, *options)


@pytest.mark.parametrize("command", ["evaluate", "bench", "compare", "inspect"])
def test_commands_load_the_plugin_before_a_model_is_opened(command, tmp_path, capsys):
    data = {"evaluate": ("--data", tmp_path), "compare": ("--reference", "x.onnx")}.get(command, ())
    line = fails(capsys, command, "--model", "x.engine", *data, "--plugin", tmp_path / "libqswin_trt.so")
    assert "tensorrt is not installed" in line or "no such library" in line
