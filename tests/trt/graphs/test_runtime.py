"""ONNX Runtime: it sends nothing of what it runs, and INT8 sums that are wrong on this CPU are found out."""

import os
import platform
import subprocess
import sys
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


def test_onnx_runtime_keeps_nothing_to_send(graphs, tmp_path):
    """Its telemetry queues events in a database in the home folder, and sends them from there later."""
    script = f"from qswin.trt.graphs.runtime import OnnxRuntimePredictor; OnnxRuntimePredictor({str(graphs['fp32'])!r})"
    home = {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    subprocess.run([sys.executable, "-c", script], env={**environment, **home}, check=True)
    assert not list(tmp_path.iterdir())
