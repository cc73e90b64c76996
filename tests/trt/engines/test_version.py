"""What versions can do, and what is said where one is not installed."""

import importlib.util

import pytest

from qswin.trt.engines.version import capabilities, find_tensorrt


@pytest.mark.parametrize(
    ("target", "version", "weak", "implicit", "gpu", "opset"),
    [
        ("tensorrt", "8.6.0", True, True, True, 17),
        ("tensorrt", "8.6.1.6", True, True, True, 17),
        ("tensorrt", "10.3.0", True, True, True, 20),
        ("tensorrt", "11.0.0.1", False, False, True, 20),
        ("tensorrt-rtx", "1.7.1.116", False, False, False, 22),
    ],
)
def test_capabilities(target, version, weak, implicit, gpu, opset):
    can = capabilities(target, version)
    assert (can.weak_typing, can.implicit_int8, can.needs_gpu, can.newest_opset) == (weak, implicit, gpu, opset)


def test_what_is_missing_is_named_with_the_command_that_adds_it():
    with pytest.raises(ValueError, match="target 'openvino' is not known; choose tensorrt or tensorrt-rtx"):
        find_tensorrt("openvino")
    if importlib.util.find_spec("tensorrt") is None:
        with pytest.raises(ValueError, match="tensorrt is not installed .*: pip install tensorrt"):
            find_tensorrt("tensorrt")
