"""ONNX Runtime: a run that does not end is stopped, and INT8 sums that are wrong on this CPU are found out."""

import platform
from pathlib import Path

import pytest
from absl import logging

from qswin.trt.graphs import runtime
from qswin.trt.graphs.runtime import OnnxRuntimePredictor, int8_sums_saturate


def test_sums_saturate_on_x86_without_vnni():
    if platform.machine() != "x86_64" or not Path("/proc/cpuinfo").is_file():
        pytest.skip("the CPU's instructions are not known")
    flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    assert int8_sums_saturate() is ("vnni" not in flags)


@pytest.mark.parametrize(("graph", "saturates", "warnings"), [("int8", True, 1), ("int8", False, 0), ("fp32", True, 0)])
def test_int8_graphs_warn_where_sums_saturate(graphs, monkeypatch, graph, saturates, warnings):
    said = []
    monkeypatch.setattr(runtime, "int8_sums_saturate", lambda: saturates)
    monkeypatch.setattr(logging, "warning", lambda message, *values: said.append(message % values))
    OnnxRuntimePredictor(graphs[graph])
    assert len(said) == warnings and all("lacks VNNI" in line for line in said)
