"""The runner of cpp/, compiled; a small bundle, written to a file."""

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from qswin.qat.bundle.format import write_bundle  # noqa: E402
from tests.qat.bundle.small import Made, make_bundle  # noqa: E402

CPP = Path(__file__).parents[2] / "cpp"


@pytest.fixture(scope="session")
def cuda_include() -> Path:
    """The folder of cuda.h, in the wheel that torch brings."""
    try:
        import nvidia.cu13 as wheel
    except ImportError:
        pytest.skip("the wheel nvidia-cuda-runtime is not installed")
    include = Path(next(iter(wheel.__path__))) / "include"
    if not (include / "cuda.h").is_file():
        pytest.skip("there is no cuda.h")
    return include


def compile_runner(folder: Path, include: Path, targets: Sequence[str], *options: str) -> Path:
    """The folder in which targets of cpp/CMakeLists.txt are built."""
    if shutil.which("cmake") is None or shutil.which("g++") is None:
        pytest.skip("there is no cmake, or no g++")
    configure = ["cmake", "-S", str(CPP), "-B", str(folder), f"-DQSWIN_CUDA_INCLUDE={include}", *options]
    subprocess.run([*configure, "-DCMAKE_CXX_COMPILER=g++"], check=True, capture_output=True)
    build = ["cmake", "--build", str(folder), "--parallel", "2", "--target", *targets]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0 and "warning" not in done.stderr, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="session")
def sanitized(tmp_path_factory, cuda_include) -> Path:
    """Compiled with AddressSanitizer and UndefinedBehaviorSanitizer."""
    options = ("-DQSWIN_SANITIZE=ON", "-DCMAKE_BUILD_TYPE=None", "-DCMAKE_CXX_FLAGS=-O1 -Werror")
    targets = ("qswin_run", "qswin_fuzz", "fake_cuda")
    return compile_runner(tmp_path_factory.mktemp("sanitized"), cuda_include, targets, *options)


@pytest.fixture(scope="session")
def made() -> Made:
    return make_bundle()


@pytest.fixture(scope="session")
def bundle_file(made, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("bundle") / "small.qsb"
    path.write_bytes(write_bundle(made.bundle))
    return path


def with_fake_driver(folder: Path, log: Path, **settings: object) -> dict[str, str]:
    """An environment in which the driver is the one of cpp/tests/fake_cuda.cpp."""
    fake = {f"FAKE_CUDA_{name.upper()}": str(value) for name, value in settings.items()}
    return {**os.environ, "LD_LIBRARY_PATH": str(folder / "fake"), "FAKE_CUDA_LOG": str(log), **fake}


@pytest.fixture(scope="session")
def plain_log(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("log") / "log"


@pytest.fixture(scope="session")
def plain(tmp_path_factory, cuda_include, plain_log) -> dict[str, str]:
    """An environment with the library as it is shipped, for Python, and the fake driver."""
    targets = ("qswin", "fake_cuda")
    folder = compile_runner(tmp_path_factory.mktemp("plain"), cuda_include, targets, "-DCMAKE_BUILD_TYPE=None")
    return with_fake_driver(folder, plain_log) | {"QSWIN_LIBRARY": str(folder / "libqswin.so")}
