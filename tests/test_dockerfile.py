"""The Dockerfile, which no test builds: what it copies, installs and starts is what the project has."""

import fnmatch
import shlex
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from tests.test_packaging import FILES, FOLDERS

tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads TOML")
ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def steps(instruction: str) -> list[list[str]]:
    """The words behind each RUN, COPY and so on."""
    lines = (ROOT / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [line[1:] for line in words if line and line[0] == instruction]


def ignored(path: str) -> bool:
    """Whether .dockerignore keeps a path from the build: its last line that matches counts."""
    result = False
    for line in (ROOT / ".dockerignore").read_text().split():
        if fnmatch.fnmatch(path, line.removeprefix("!")):
            result = not line.startswith("!")
    return result


def test_the_python_is_one_that_the_lock_file_is_for():
    ((image,),) = steps("FROM")
    version = image.removeprefix("python:").split("-")[0]
    assert version.count(".") == 2  # a release, not a name that moves
    assert version in SpecifierSet(PROJECT["requires-python"])
    assert f"on Python {version.rpartition('.')[0]} " in (ROOT / "constraints" / "lock.txt").read_text()


def test_what_is_copied_is_what_the_wheel_is_made_of():
    """tests/test_packaging.py makes the wheel of just these."""
    copied = [source for *sources, _ in steps("COPY") for source in sources]
    assert sorted(copied) == sorted([*FILES, *FOLDERS, "constraints/lock.txt"])
    assert not [path for path in copied if ignored(path)] and ignored("runs")


def test_what_is_installed_is_pinned():
    (install,) = [words for words in steps("RUN") if words[:2] == ["pip", "install"]]
    assert install[install.index("--constraint") + 1] == "/tmp/lock.txt"
    (wanted,) = [word for word in install if word.startswith("/tmp/qswin[")]
    extras = Requirement(f"qswin{wanted.removeprefix('/tmp/qswin')}").extras
    pinned = [Requirement(line) for line in (ROOT / "constraints" / "lock.txt").read_text().splitlines()[1:]]
    locked = {_normal(each.name): str(each.specifier).removeprefix("==") for each in pinned}
    optional = PROJECT["optional-dependencies"]
    for text in [*PROJECT["dependencies"], *(text for extra in extras for text in optional[extra])]:
        requirement = Requirement(text)
        assert locked[_normal(requirement.name)] in requirement.specifier, text


def _normal(name: str) -> str:
    return name.lower().replace("_", "-")


def test_it_starts_a_command_of_the_project_without_roots_rights():
    ((command,),) = [[word.strip("[]") for word in words] for words in steps("ENTRYPOINT")]
    assert command in PROJECT["scripts"]
    assert steps("USER") == [["qswin"]]
