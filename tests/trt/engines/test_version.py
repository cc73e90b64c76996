"""What versions can do, and what is said where one is not installed."""

import importlib.util
import subprocess
import sys

import pytest

from qswin.trt.engines.version import capabilities, find_tensorrt


@pytest.mark.parametrize(
    ("target", "version", "weak", "implicit", "gpu", "opset", "fp8"),
    [
        ("tensorrt", "8.6.0", True, True, True, 17, False),
        ("tensorrt", "8.6.1.6", True, True, True, 17, False),
        ("tensorrt", "10.3.0", True, True, True, 20, True),
        ("tensorrt", "11.0.0.1", False, False, True, 20, True),
        ("tensorrt-rtx", "1.7.1.116", False, False, False, 22, True),
    ],
)
def test_capabilities(target, version, weak, implicit, gpu, opset, fp8):
    can = capabilities(target, version)
    assert (can.weak_typing, can.implicit_int8, can.needs_gpu, can.newest_opset) == (weak, implicit, gpu, opset)
    assert can.fp8 is fp8


def test_what_is_missing_is_named_with_the_command_that_adds_it():
    with pytest.raises(ValueError, match="target 'openvino' is not known; choose tensorrt or tensorrt-rtx"):
        find_tensorrt("openvino")
    if importlib.util.find_spec("tensorrt") is None:
        with pytest.raises(ValueError, match="tensorrt is not installed .*: pip install tensorrt"):
            find_tensorrt("tensorrt")


ONLY_RTX = """
import sys
sys.modules["tensorrt"] = None  # importing it fails
from qswin.trt.engines.layers import engine_layers
from qswin.trt.engines.precision import set_layer_precisions
from qswin.trt.engines.version import find_tensorrt, tensorrt_module
import tensorrt_rtx_bindings

class Engine:
    def create_engine_inspector(self):
        return self

    def get_engine_information(self, form):
        assert form is tensorrt_rtx_bindings.LayerInformationFormat.JSON
        return '{"Layers": ["a + b"]}'

assert find_tensorrt("tensorrt-rtx").target == "tensorrt-rtx"
assert [layer.nodes for layer in engine_layers(Engine())] == [("a", "b")]
assert issubclass(tensorrt_module().IProfiler, tensorrt_rtx_bindings.IProfiler)
set_layer_precisions([], {})
"""


def test_engines_are_listed_where_only_tensorrt_rtx_is_installed():
    """In a process of its own, for one process uses one of the two."""
    pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed")
    done = subprocess.run([sys.executable, "-c", ONLY_RTX], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
