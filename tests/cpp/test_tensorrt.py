"""The plugin for TensorRT, without TensorRT: it compiles against the headers, and does what TensorRT asks of it.

QSWIN_TENSORRT_HEADERS names a folder with TensorRT's include folders, one for each version (8.6.0, 10.9.0, ...): those
of https://github.com/NVIDIA/TensorRT by their tags.
"""

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cpp.conftest import CPP, compile_runner, with_fake_driver
from tests.cpp.test_runner import expected

VARIABLE = "QSWIN_TENSORRT_HEADERS"
SOURCES = ("library.cpp", "model.cpp", "plugin.cpp")


def headers() -> list[Path]:
    folder = os.environ.get(VARIABLE)
    found = [path.parent for path in Path(folder).glob("*/NvInferRuntime.h")] if folder else []
    return sorted(found, key=lambda path: [int(number) for number in re.findall(r"\d+", path.name)])


HEADERS = headers()
pytestmark = pytest.mark.skipif(not HEADERS, reason=f"{VARIABLE} names no folder with TensorRT's headers")


@pytest.mark.parametrize("include", HEADERS, ids=lambda path: path.name)
def test_it_compiles_without_a_warning(cuda_include, include):
    folders = ["-isystem", str(CPP / "tensorrt" / "cuda"), "-isystem", str(cuda_include), "-isystem", str(include)]
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Wconversion", "-Werror", "-fsyntax-only", f"-I{CPP}", *folders]
    for source in SOURCES:
        done = subprocess.run(["g++", *flags, str(CPP / "tensorrt" / source)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="module", params=[HEADERS[0], HEADERS[-1]] if HEADERS else [], ids=lambda path: path.name)
def plugin(request, tmp_path_factory, cuda_include) -> Path:
    """The folder of the library and its test program, with sanitizers, for the oldest and the newest version."""
    options = (f"-DQSWIN_TENSORRT_INCLUDE={request.param}", "-DQSWIN_SANITIZE=ON", "-DCMAKE_BUILD_TYPE=None")
    targets = ("qswin_trt", "qswin_plugin_test", "fake_cuda")
    folder = tmp_path_factory.mktemp("plugin")
    return compile_runner(folder, cuda_include, targets, *options, "-DCMAKE_CXX_FLAGS=-O1 -Werror")


@pytest.fixture
def steps(plugin, bundle_file, tmp_path):
    """Runs steps of cpp/tests/plugin.cpp: (the lines that they print, without the first; the driver's log)."""

    def run(*names: str, bundle: Path = bundle_file, side: int = 32, logger: bool = True, **settings: object):
        log = tmp_path / "log"
        log.unlink(missing_ok=True)
        environment = with_fake_driver(plugin, log, **settings) | {"QSWIN_TEST_SIDE": str(side)}
        if logger:
            environment["QSWIN_TEST_LOGGER"] = "1"
        command = [plugin / "qswin_plugin_test", plugin / "libqswin_trt.so", bundle, *names]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr
        first, *lines = done.stdout.splitlines()
        assert first == "creator 1 QswinBundle 1 bundle"
        driver = log.read_text().splitlines() if log.exists() else []
        assert not driver or driver[-1] == "left 0 allocations 0 modules 0 contexts"
        return lines + done.stderr.splitlines(), driver

    return run


def addresses(line: str) -> Iterator[int]:
    """Of the workspace, the images and the logits, in a line of a step enqueue."""
    return (int(word, 16) for word in line.split()[2:])


@pytest.mark.parametrize(("batch", "index"), [(1, 0), (4, 1)])
def test_an_engines_plugin_launches_what_its_bundle_says(steps, made, batch, index):
    """Made, serialized, read again, cloned and copied for a second context: weights are loaded once."""
    before = ("create", "deserialize", "clone", "shape", "configure:-1,1,4", "initialize", "copy")
    lines, driver = steps(*before, f"enqueue:{batch}")
    names = ["create QswinBundle", "deserialize the same QswinBundle", "clone QswinBundle"]
    shape = f"shape 2 7 {made.bundle.classes} float 1 half 0 type 0 outputs 1"
    workspace = max(each.workspace for each in made.bundle.batches)
    assert lines[:-2] == [*names, shape, f"configure {workspace}", "initialize 0", "copy QswinBundle"]
    (load, *launches), constants = driver[:-1], len(made.bundle.constants)
    assert load.startswith("allocate") and int(load.split()[2]) == constants
    planned = made.bundle.batches[index].launches
    assert len(launches) == 2 * len(planned)  # and nothing else is allocated
    for context, line in enumerate(lines[-2:]):
        assert line.startswith("enqueue 0 ")
        starts = dict(zip(("workspace", "input", "output"), addresses(line), strict=True))
        starts["constants"] = int(load.split()[1])
        for launch, found in zip(planned, launches[context * len(planned) :], strict=False):
            words = expected(launch, made.bundle.code[90][launch.kernel], starts)
            words[5] = str(context + 1)  # the stream
            assert found.split()[1:] == words


@pytest.mark.parametrize("step", ["cut", "changed"])
def test_damaged_data_is_refused(steps, step):
    lines, _ = steps("create", step)
    why = {"cut": "cut off, or changed", "changed": "a checksum does not hold"}[step]
    assert lines[1].startswith("log 1 QswinBundle: ") and why in lines[1] and lines[2:] == [f"{step} nothing"]


def test_what_is_no_bundle_is_refused(steps, tmp_path):
    (tmp_path / "x.qsb").write_bytes(b"no bundle")
    lines, _ = steps("create", bundle=tmp_path / "x.qsb")
    assert "QswinBundle: not a bundle" in lines[0] and lines[1] == "create nothing"
    (tmp_path / "x.qsb").write_bytes(b"")
    assert "needs a field named bundle" in steps("create", bundle=tmp_path / "x.qsb")[0][0]


@pytest.mark.parametrize(("profile", "bad"), [("-1,1,3", 3), ("-1,2,4", 2), ("2,2,2", 2)])
def test_a_profile_that_the_bundle_lacks_is_refused_when_an_engine_is_built(steps, profile, bad):
    lines, driver = steps("create", f"configure:{profile}", "clone", "initialize")
    assert lines[1] == f"log 1 QswinBundle: batch {bad}: the bundle holds 1, 4"
    assert lines[-1] == "initialize 1" and not driver


def test_a_batch_that_the_bundle_lacks_is_refused_and_the_next_runs(steps):
    lines, driver = steps(
        "create", "configure:-1,1,4", "initialize", "enqueue:3", "configure:4,4,4", "initialize", "enqueue:4"
    )
    assert lines[3] == "log 1 QswinBundle: batch 3: the bundle holds 1, 4" and lines[4].startswith("enqueue 1 ")
    assert lines[-1].startswith("enqueue 0 ") and sum(line.startswith("launch") for line in driver) == 34


def test_images_of_another_size_are_refused(steps):
    lines, driver = steps("create", "configure:-1,1,4", "initialize", side=64)
    assert "gets other images than those of its bundle, N x 3 x 32 x 32" in lines[1] and lines[-1] == "initialize 1"
    lines, driver = steps("create", "initialize", "enqueue:4", side=64)
    assert lines[-1].startswith("enqueue 1 ") and not any(line.startswith("launch") for line in driver)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"capability": 75}, "this GPU is 75; build it with another --arch"),
        ({"fail": 1}, "bytes of GPU memory for the bundle's weights: out of memory"),
        ({"no_gpu": 1}, "the NVIDIA driver finds no GPU that it can use"),
        ({"no_context": 1}, "finding the thread's device"),
    ],
)
def test_what_fails_on_the_gpu_is_one_line(steps, settings, message):
    """Without TensorRT's logger, on standard error. A plugin that could not be initialized does not run."""
    lines, driver = steps("create", "initialize", "enqueue:1", logger=False, **settings)
    assert lines[1] == "initialize 1" and lines[2].startswith("enqueue 1 ")
    assert message in lines[3] and len(lines) == 5 and "is NULL" in lines[4]
    assert not any(line.startswith("launch") for line in driver)
