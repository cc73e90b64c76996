"""The wheel, installed beside a user's own packages called models and trt."""

import email
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
FILES = ("pyproject.toml", "README.md", "LICENSE")
FOLDERS = ("qswin", "models", "calib", "qat", "trt")
CALLS = '''\
"""The calls of the README on a small model, in a folder that has its own models/ and trt/."""

from pathlib import Path

import models
import torch
import trt

import qswin
from qswin import build_model, calibrate, enable, export_onnx, load_checkpoint, named_recipe, quantize, save_checkpoint
from qswin import Description, Preprocessing, disable, save_onnx

here = Path(__file__).parent
assert (models.OWNER, trt.OWNER) == ("the user", "the user")
assert Path(qswin.__file__).is_relative_to(here.parent / "env"), qswin.__file__
for name in qswin.__all__:
    assert getattr(qswin, name).__module__.startswith("qswin."), name

name, settings = "swin_tiny_patch4_window7_224", {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 16}
settings |= {"num_classes": 5, "depths": [1, 1], "num_heads": [2, 4]}
images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
recipe = named_recipe("full")
model = quantize(build_model(name, **settings), recipe)
calibrate(model, [images])
disable(model)
in_float = model(images)
enable(model)
expected = model(images)
assert not torch.equal(in_float, expected)
description = Description({"name": name, **settings}, "ptq", Preprocessing(size=(32, 32)), recipe=recipe)
save_checkpoint(here / "ptq.safetensors", model, description)
loaded, read = load_checkpoint(here / "ptq.safetensors")
assert torch.equal(loaded(images), expected) and read == description
save_onnx(here / "int8.onnx", export_onnx(loaded, read), read.to_dict())
'''


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy: setuptools would take up what an earlier build left in the folder build/."""
    source = tmp_path_factory.mktemp("source")
    for name in FILES:
        shutil.copy(ROOT / name, source)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", source, source)
    (built,) = source.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel) -> Path:
    """A new environment with the wheel, which finds its dependencies in the one that runs the tests, after its own."""
    folder = wheel.parent / "env"
    venv.create(folder, symlinks=True)
    pip("--python", folder, "install", "--no-deps", "--no-index", wheel)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    return folder


@pytest.fixture
def folder(wheel) -> Path:
    """A user's working directory with two packages of their own."""
    folder = wheel.parent / "work"
    for name in ("models", "trt"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "__init__.py").write_text('OWNER = "the user"\n')
    return folder


def pip(*arguments: str | Path) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--quiet", *map(str, arguments)], check=True)


def run(folder: Path, *command: str | Path) -> str:
    """What a command prints, in a user's folder; nothing leads it to the checkout."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    process = subprocess.run([*map(str, command)], cwd=folder, env=environment, text=True, capture_output=True)
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_the_wheel_holds_every_module_and_nothing_else(wheel):
    files = {file.relative_to(ROOT) for name in FOLDERS for file in (ROOT / name).rglob("*.py")}
    files |= {file.relative_to(ROOT) for file in (ROOT / "trt" / "package" / "templates").iterdir()}
    expected = {file.as_posix() if file.parts[0] == "qswin" else f"qswin/{file.as_posix()}" for file in files}
    found = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert found == expected


@pytest.mark.slow
def test_two_wheels_of_a_commit_are_the_same_bytes(tmp_path):
    """Made by make wheel in two clones, of other file times and under other masks of permissions."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("this is not a clone of the repository")
    made = []
    for mask in (0o022, 0o077):
        clone = tmp_path / f"{mask:o}"
        subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True, umask=mask)
        (clone / ".venv").symlink_to(Path(sys.prefix))
        subprocess.run(["make", "--old-file", ".venv/ready", "wheel"], cwd=clone, check=True, umask=mask)
        made += clone.glob("dist/*.whl")
    first, second = (wheel.read_bytes() for wheel in made)
    assert first == second


def test_only_qswin_is_installed(environment):
    (packages,) = environment.glob("lib/python*/site-packages")
    names = {path.name for path in packages.iterdir() if not path.name.startswith(("pip", "setuptools"))}
    assert {name for name in names if not re.fullmatch(r"qswin-.*\.dist-info", name)} == {"qswin", "dependencies.pth"}


@pytest.mark.slow
def test_the_calls_of_the_readme_run_beside_a_users_models_and_trt(environment, folder):
    (folder / "calls.py").write_text(CALLS)
    run(folder, environment / "bin" / "python", "calls.py")
    assert (folder / "int8.onnx").stat().st_size > 1000


def test_the_console_script_runs_beside_a_users_models_and_trt(environment, folder):
    script = environment / "bin" / "qswin"
    assert "calibrate" in run(folder, script, "--help")
    assert "--model" in run(folder, script, "evaluate", "--help")
    assert "--config" in run(folder, environment / "bin" / "python", "-m", "qswin", "train", "--help")


def requirements(wheel: Path) -> list[Requirement]:
    """What the wheel's metadata says that it needs, extras included."""
    (name,) = (name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".dist-info/METADATA"))
    metadata = email.message_from_bytes(zipfile.ZipFile(wheel).read(name))
    return [Requirement(line) for line in metadata.get_all("Requires-Dist")]


def extra_of(requirement: Requirement) -> str | None:
    found = re.search(r'extra == "(\w+)"', str(requirement.marker))
    return found and found[1]


def test_a_user_installs_no_test_tools(wheel):
    names = {requirement.name for requirement in requirements(wheel) if extra_of(requirement) is None}
    tools = {requirement.name for requirement in requirements(wheel) if extra_of(requirement) == "test"}
    assert {"torch", "onnx"} <= names and "pytest" in tools and not names & tools


def test_every_dependency_has_a_floor_and_the_constraints_pin_it(wheel):
    floors = {}
    for requirement in requirements(wheel):
        if extra_of(requirement) != "test":
            (specifier,) = requirement.specifier
            assert specifier.operator == ">=", requirement
            floors[requirement.name] = specifier.version
    lines = (ROOT / "constraints" / "floors.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    assert {pin.name: str(pin.specifier).removeprefix("==").removesuffix(".*") for pin in pins} == floors


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_first_minutes(wheel):
    """From an empty folder, the wheel and five checkpoints of five sources to five verdicts."""
    pytest.importorskip("transformers")
    command = ["bash", ROOT / "tests" / "first_minutes.sh", wheel]
    done = subprocess.run(command, env={**os.environ, "PYTHON": sys.executable}, text=True, stdout=subprocess.PIPE)
    assert done.returncode == 0, done.stdout
    assert re.search(r"five checkpoints: \d+ s, 5 commands\n$", done.stdout)
