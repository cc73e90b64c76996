"""The C++ example of a package: compiled against qswin.h, run with the driver that runs nothing."""

import subprocess
from pathlib import Path

import numpy as np
import pytest

from qswin.calib.files import write_with_sidecar
from tests.cpp.conftest import CPP
from tests.helpers import invoke

LABELS = [f"class {index}" for index in range(5)]


@pytest.fixture
def package(tmp_path, made, bundle_file) -> Path:
    assert made.bundle.classes == len(LABELS)
    values = {"target": "bundle", "version": "3.8.0", "engine_precision": "int8", "batch_sizes": [1, 4]}
    values |= {"preprocessing": {"size": [32, 32]}, "task": "classification", "classes": LABELS}
    (tmp_path / "run").mkdir()
    write_with_sidecar(tmp_path / "run" / "small.qsb", bundle_file.read_bytes(), "bundle", values)
    assert invoke("package", tmp_path / "run", "--out", tmp_path / "deploy") == 0
    return tmp_path / "deploy"


def check_example(program: Path, package: Path, environment: dict[str, str]) -> None:
    """Its output over images whose logits the driver leaves at 0, and its errors."""

    def run(*arguments):
        command = [program, *map(str, arguments)]
        return subprocess.run(command, cwd=package, env=environment, capture_output=True, text=True)

    np.zeros((6, 3, 32, 32), "<f4").tofile(package / "pixels.f32")
    done = run("small.qsb", "pixels.f32", "labels.txt")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[::6] == [f"image {index}" for index in range(6)] and lines[1:6] == [f"  0.2000  {n}" for n in LABELS]
    np.zeros(7, "<f4").tofile(package / "part.f32")
    (package / "few.txt").write_text("one\n")
    for arguments, words in (
        (("small.qsb", "part.f32", "labels.txt"), "not whole images of 3072 float32"),
        (("small.qsb", "pixels.f32", "few.txt"), "the bundle has 5 classes, the labels 1"),
        (("small.qsb", "none.f32", "labels.txt"), "none.f32: cannot be read"),
        (("labels.txt", "pixels.f32", "labels.txt"), "not a bundle"),
        ((), "usage: classify"),
    ):
        done = run(*arguments)
        assert done.returncode == 2 and words in done.stderr and len(done.stderr.splitlines()) == 1


def test_the_example_compiles_and_runs(package, tmp_path, cuda_include, plain):
    program, library = tmp_path / "classify", Path(plain["QSWIN_LIBRARY"])
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Wconversion", "-Werror", "-isystem", cuda_include, "-I", CPP]
    linked = [library, library.parent / "fake" / "libcuda.so.1", f"-Wl,-rpath,{library.parent}"]
    command = ["g++", *flags, package / "main.cpp", "-o", program, *linked]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    check_example(program, package, plain)


@pytest.mark.slow
def test_cmake_builds_it(package, tmp_path, cuda_include, plain):
    driver = Path(plain["QSWIN_LIBRARY"]).parent / "fake" / "libcuda.so.1"
    configure = ["cmake", "-S", package, "-B", tmp_path / "build", "-DCMAKE_CXX_COMPILER=g++"]
    refused = subprocess.run([*map(str, configure)], capture_output=True, text=True)
    assert refused.returncode != 0 and "give the folder cpp/ of qswin with -D" in " ".join(refused.stderr.split())
    settings = {"QSWIN_SOURCE": CPP, "QSWIN_CUDA_INCLUDE": cuda_include, "CUDA_DRIVER": driver}
    configure += [f"-D{name}={value}" for name, value in settings.items()]
    subprocess.run([*map(str, configure)], check=True, capture_output=True)
    build = ["cmake", "--build", str(tmp_path / "build")]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0 and "warning" not in done.stderr, done.stdout + done.stderr
    check_example(tmp_path / "build" / "classify", package, plain)
