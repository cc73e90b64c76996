"""The runner with a driver that runs nothing: what it asks of the GPU, and that nothing is left when it ends."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from qswin.qat.bundle.contents import Buffer
from tests.cpp.conftest import with_fake_driver


def run(sanitized, log, *arguments, images=b"", **settings):
    """(exit code, standard output, the error's line, the driver's log) of qswin_run."""
    environment = with_fake_driver(sanitized, log, **settings)
    done = subprocess.run(
        [sanitized / "qswin_run", *map(str, arguments)], input=images, capture_output=True, env=environment
    )
    return done.returncode, done.stdout, done.stderr.decode().strip(), log.read_text() if log.exists() else ""


@pytest.fixture
def log(tmp_path):
    return tmp_path / "log"


def test_launches_are_those_of_the_file(sanitized, made, bundle_file, log):
    images = np.zeros((4, 3, 32, 32), dtype=np.float32).tobytes()
    code, logits, error, lines = run(sanitized, log, bundle_file, 4, images=images)
    assert (code, error) == (0, "") and len(logits) == 4 * 4 * made.bundle.classes
    addresses, launches = {}, []
    for line in lines.splitlines():
        words = line.split()
        if words[0] == "allocate":
            addresses[int(words[2])] = int(words[1])
        elif words[0] == "launch":
            launches.append(words[1:])
    batch = made.bundle.batches[1]
    spaces = {"constants": len(made.bundle.constants), "workspace": batch.workspace}
    spaces |= {"input": len(images), "output": len(logits)}
    starts = {space: addresses[size] for space, size in spaces.items()}
    assert launches == [expected(launch, made.bundle.code[90][launch.kernel], starts) for launch in batch.launches]
    assert lines.endswith("left 0 allocations 0 modules 0 contexts\n")


def expected(launch, cubin, starts):
    """A launch as the fake driver prints it: grid, threads, shared memory, stream, arguments."""
    words = [str(value) for value in (*launch.grid, cubin.threads, cubin.shared, 0)]
    for argument in launch.arguments:
        if isinstance(argument, Buffer):
            words.append(str(starts[argument.space] + argument.offset))
        elif isinstance(argument, float):
            words.append(f"{torch.tensor(argument).item():.9g}")
        else:
            words.append("0" if argument is None else str(argument))
    return words


@pytest.mark.parametrize("capability", [80, 86, 87, 89, 90])
def test_code_of_the_same_generation_is_taken(sanitized, bundle_file, log, capability):
    """The bundle has code for 8.0 and 9.0."""
    code, _, error, lines = run(sanitized, log, bundle_file, 1, images=bytes(4 * 3 * 32 * 32), capability=capability)
    assert (code, error) == (0, "") and "launch" in lines


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"capability": 75}, "the bundle holds code for 80, 90, and this GPU is 75; build it with another --arch"),
        ({"capability": 100}, "this GPU is 100"),
        ({"fail": 1}, "bytes of GPU memory for the bundle's weights: out of memory"),
        ({"fail": 7}, "loading kernel5 with a driver for CUDA 12.4, which may be too old"),
        ({"fail": 2 + 23}, "out of memory"),
        ({"no_gpu": 1}, "the NVIDIA driver finds no GPU that it can use"),
    ],
)
def test_what_fails_is_one_line_and_leaves_nothing(sanitized, bundle_file, log, settings, message):
    code, _, error, lines = run(sanitized, log, bundle_file, 1, images=bytes(4 * 3 * 32 * 32), **settings)
    assert code == 2 and message in error and len(error.splitlines()) == 1
    assert "launch" not in lines and lines.endswith("left 0 allocations 0 modules 0 contexts\n")


def test_every_allocation_may_fail(sanitized, made, bundle_file, log):
    """Weights, each kernel, the workspace, the images, the logits: whichever fails, nothing is left."""
    resources = 1 + len(made.bundle.signatures) + 3
    for which in range(1, resources + 2):
        code, _, error, lines = run(sanitized, log, bundle_file, 1, images=bytes(4 * 3 * 32 * 32), fail=which)
        assert (code == 0) == (which > resources), error
        assert lines.endswith("left 0 allocations 0 modules 0 contexts\n")


@pytest.mark.parametrize(
    ("change", "batch", "message"),
    [
        (lambda data: data[:1000], 1, "cut off, or changed"),
        (lambda data: data, 2, "batch 2: the bundle holds 1, 4"),
        (lambda data: data, 4, "standard input has fewer than 12288 float32"),
        (lambda data: data[:-1] + bytes([data[-1] ^ 1]), 1, "a checksum does not hold"),
        (lambda data: b"", 1, "cannot be read"),
    ],
    ids=["cut", "batch", "images", "code", "empty"],
)
def test_bad_input_is_one_line(sanitized, bundle_file, tmp_path, log, change, batch, message):
    (tmp_path / "x.qsb").write_bytes(change(bundle_file.read_bytes()))
    code, _, error, _ = run(sanitized, log, tmp_path / "x.qsb", batch)
    assert code == 2 and message in error and len(error.splitlines()) == 1


def test_without_a_driver_it_says_so(sanitized, bundle_file):
    """Reading bundles needs none."""
    if torch.cuda.is_available():
        pytest.skip("there is a driver")
    done = subprocess.run([sanitized / "qswin_run", bundle_file, "1"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "qswin_run: error: there is no NVIDIA driver here: libcuda.so.1 cannot be loaded\n"


BINDING = """
import sys
from pathlib import Path
from qswin.qat.bundle.runner import Runner

data = Path(sys.argv[1]).read_bytes()
first, second = Runner(data), Runner(data)
print(first.architecture)
contexts = [first.context(1), first.context(1), second.context(4)]
first.close()  # its contexts go on
for stream, context in enumerate(contexts):
    context.enqueue(stream, 1 << 20, 1 << 21)
for work in (lambda: contexts[0].enqueue(0, 8, 1 << 21), lambda: contexts[0].enqueue(0, 0, 16),
             lambda: second.context(3), lambda: Runner(data[:-1]), lambda: Runner(data, 5)):
    try:
        work()
    except ValueError as error:
        print(error)
"""


def test_the_binding_has_several_contexts_and_bundles(made, bundle_file, plain, plain_log):
    done = subprocess.run([sys.executable, "-c", BINDING, bundle_file], capture_output=True, text=True, env=plain)
    assert done.returncode == 0, done.stderr[-2000:]
    architecture, *errors = done.stdout.splitlines()
    assert architecture == "90" and len(errors) == 5
    for error, words in zip(errors, ("multiple of 16", "is NULL", "batch 3", "cut off", "no device 5"), strict=True):
        assert words in error
    lines = plain_log.read_text().splitlines()
    launches = [line.split() for line in lines if line.startswith("launch")]
    assert [words[6] for words in launches] == ["0"] * 34 + ["1"] * 34 + ["2"] * 34
    assert launches[0][1:6] == launches[34][1:6] and launches[0][8:] != launches[34][8:]  # workspaces of their own
    assert lines[-1] == "left 0 allocations 0 modules 0 contexts"


IN = """
import ctypes, sys
from pathlib import Path
from qswin.qat.bundle.runner import Runner, library

runner, size = Runner(Path(sys.argv[1]).read_bytes()), ctypes.c_size_t()
pointers = [ctypes.c_void_p(runner._handle), ctypes.c_uint32(4)]
assert library().qswin_workspace_size(*pointers, ctypes.byref(size)) == 0
print(size.value)
addresses = [ctypes.c_void_p(value << 20) for value in (1, 0, 2, 3)]  # workspace, stream, input, output
assert library().qswin_enqueue_in(*pointers, *addresses) == 0
for changed in ({1: ctypes.c_uint32(3)}, {2: None}, {2: ctypes.c_void_p(8)}, {4: None}):
    arguments = [changed.get(index, value) for index, value in enumerate([*pointers, *addresses])]
    assert library().qswin_enqueue_in(*arguments) == 2
    print(library().qswin_error().decode())
"""


def test_a_workspace_of_the_callers_is_used(made, bundle_file, plain, plain_log):
    done = subprocess.run([sys.executable, "-c", IN, bundle_file], capture_output=True, text=True, env=plain)
    assert done.returncode == 0, done.stderr[-2000:]
    size, *errors = done.stdout.splitlines()
    assert int(size) == made.bundle.batches[1].workspace
    for error, words in zip(errors, ("batch 3", "workspace is NULL", "multiple of 16", "is NULL"), strict=True):
        assert words in error
    allocated, *lines = plain_log.read_text().splitlines()
    launches = [line.split()[1:] for line in lines if line.startswith("launch")]
    starts = {"workspace": 1 << 20, "input": 2 << 20, "output": 3 << 20, "constants": int(allocated.split()[1])}
    code = made.bundle.code[90]
    assert launches == [expected(each, code[each.kernel], starts) for each in made.bundle.batches[1].launches]
    assert lines[-1] == "left 0 allocations 0 modules 0 contexts" and len(lines) == len(launches) + 1


WITHOUT = """
from qswin.qat.bundle.runner import library
try:
    library()
except ValueError as error:
    print(error)
"""


def test_a_library_that_is_missing_is_named(tmp_path):
    environment = with_fake_driver(tmp_path, tmp_path / "log") | {"QSWIN_LIBRARY": str(tmp_path / "libqswin.so")}
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, env=environment, check=True)
    assert "needs libqswin.so, which is not found" in done.stdout and "cmake -S cpp -B cpp/build" in done.stdout
