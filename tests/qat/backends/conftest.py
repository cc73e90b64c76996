"""The exported graphs of the tests of trt/."""

from tests.trt.conftest import graphs  # noqa: F401
