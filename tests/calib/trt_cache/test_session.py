"""Graphs of a few bytes that ask for more time or memory than there is: one line, and the process has its memory back.

Each runs in a process of its own, whose memory is bounded: were a limit not kept, no other process would suffer.
"""

import resource
import subprocess
import sys

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from qswin.calib.trt_cache import session
from qswin.calib.trt_cache.session import Session, limited_memory, memory_limit

FLOAT = TensorProto.FLOAT
IMAGES = np.ones((1, 3, 4, 4), np.float32)
RUN = """
import resource, sys
import numpy as np
from qswin.calib.trt_cache import session
resource.setrlimit(resource.RLIMIT_DATA, (6 << 30, 6 << 30))
session.GRACE = 0.5
try:
    loaded = session.Session("x.onnx", open(sys.argv[1], "rb").read(), float(sys.argv[2]), threads=1)
    print("loaded", flush=True)
    loaded.run(["logits"], np.ones((1, 3, 4, 4), np.float32))
except ValueError as error:
    print(error)
"""


def graph(nodes, **constants) -> bytes:
    """`nodes` make the scalar "extra" of `input`; what the graph gives is their sum."""
    add = helper.make_node("Add", ["input", "extra"], ["logits"])
    values = [helper.make_tensor_value_info(name, FLOAT, ["N", 3, 4, 4]) for name in ("input", "logits")]
    weights = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    whole = helper.make_graph([*nodes, add], "g", values[:1], values[1:], weights)
    opset = [helper.make_opsetid("", 20)]
    return helper.make_model(whole, opset_imports=opset, ir_version=9).SerializeToString()


def huge(values: int) -> bytes:
    """A tensor of so many values, made while the graph runs."""
    one = helper.make_node("ReduceSum", ["input"], ["one"], keepdims=0)
    many = helper.make_node("Expand", ["one", "shape"], ["many"])
    return graph([one, many, helper.make_node("ReduceSum", ["many"], ["extra"], keepdims=0)], shape=[values])


def endless() -> bytes:
    """A Loop of 2 ** 62 rounds."""
    value = helper.make_tensor_value_info
    inputs = [value("i", TensorProto.INT64, []), value("on", TensorProto.BOOL, []), value("x", FLOAT, None)]
    outputs = [value("still", TensorProto.BOOL, []), value("y", FLOAT, None)]
    nodes = [helper.make_node("Identity", ["on"], ["still"]), helper.make_node("Neg", ["x"], ["y"])]
    body = helper.make_graph(nodes, "body", inputs, outputs)
    return graph([helper.make_node("Loop", ["rounds", "true", "input"], ["extra"], body=body)], rounds=2**62, true=True)


def long_load(side: int) -> bytes:
    """A product of constant matrices, which ONNX Runtime computes while it loads the graph; nothing interrupts it."""
    nodes = [
        helper.make_node("Tile", ["one", "repeats"], ["a"]),
        helper.make_node("MatMul", ["a", "a"], ["b"]),
        helper.make_node("ReduceSum", ["b"], ["extra"], keepdims=0),
    ]
    return graph(nodes, one=np.ones((1, 1), np.float32), repeats=[side, side])


def outcome(path, model: bytes, timeout: float) -> tuple[int, list[str], str]:
    """The exit code, what was printed, and standard error."""
    path.write_bytes(model)
    command = [sys.executable, "-c", RUN, str(path), str(timeout)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout.splitlines(), done.stderr


@pytest.mark.parametrize("values", [10**12, 2 * 10**9])
def test_more_memory_than_there_is_is_refused(tmp_path, values):
    code, lines, _ = outcome(tmp_path / "x.onnx", huge(values), 60)
    assert code == 0 and lines[0] == "loaded"
    assert lines[1].startswith("x.onnx: to run it takes more than 75 % of the memory that is free; take smaller batch")


def test_a_loop_that_does_not_end_is_stopped(tmp_path):
    code, lines, _ = outcome(tmp_path / "x.onnx", endless(), 0.5)
    assert (code, lines[1:]) == (0, ["x.onnx: to run it took longer than 0.5 s; give a larger --timeout"])


def test_an_operation_that_nothing_stops_ends_the_process(tmp_path):
    code, lines, errors = outcome(tmp_path / "x.onnx", long_load(10_000), 0.5)
    line = "qswin: error: x.onnx: to load it took longer than 0.5 s; give a larger --timeout\n"
    assert (code, lines, errors) == (2, [], line)


def test_limits_leave_nothing_behind():
    """The sum of 48 ones and each of them; the memory's limit is what it was."""
    before = resource.getrlimit(resource.RLIMIT_DATA)
    limited = Session("x.onnx", huge(1), timeout=60)
    for _ in range(2):
        assert np.array_equal(limited.run(["logits"], IMAGES)[0], IMAGES + 48)
    assert resource.getrlimit(resource.RLIMIT_DATA) == before


def test_a_graph_that_fails_is_an_error_that_names_it():
    with pytest.raises(ValueError, match=r"^x\.onnx: ONNX Runtime cannot load it \(.*\); export it again"):
        Session("x.onnx", b"no graph")
    beyond = graph([helper.make_node("Gather", ["input", "index"], ["extra"])], index=99)
    with pytest.raises(ValueError, match=r"^x\.onnx: ONNX Runtime cannot run it \(.*Gather.*\); export it again"):
        Session("x.onnx", beyond).run(["logits"], IMAGES)


def test_a_stricter_limit_stays(monkeypatch):
    calls = []
    monkeypatch.setattr(session.resource, "getrlimit", lambda kind: (1000, 2000))
    monkeypatch.setattr(session.resource, "setrlimit", lambda kind, limits: calls.append(limits))
    with limited_memory(5000), limited_memory(None):
        assert not calls
    with limited_memory(500):
        assert calls == [(500, 2000)]
    assert calls[1:] == [(1000, 2000)]


def test_limits_grow_with_the_variable(monkeypatch):
    free = {"VmData": 100, "MemAvailable": 1000}
    monkeypatch.setattr(session, "_bytes", lambda file, key: free[key])
    assert memory_limit() == 850
    monkeypatch.setenv("QSWIN_LIMITS", "2")
    assert memory_limit() == 1600
    monkeypatch.setattr(session, "_bytes", lambda file, key: open(file + "x"))
    assert memory_limit() is None
