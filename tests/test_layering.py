"""What the folders may import, and that engines are evaluated where there is no torch."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("models", "calib", "trt", "qat")
FILES = [*sorted((ROOT / "qswin").glob("*.py")), *(f for top in FOLDERS for f in sorted((ROOT / top).rglob("*.py")))]
ALLOWED = {"models": {"models"}, "calib": {"calib"}, "trt": {"trt", "calib"}, "qat": {"qat", "models", "calib", "trt"}}
BELOW = {"qswin.limits"}  # which all may import


def module_name(file: Path) -> str:
    """qswin.calib.files of calib/files.py."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(("qswin", *(part for part in parts if part not in ("qswin", "__init__"))))


MODULES = {module_name(file): file for file in FILES}


def imports_of(file: Path) -> set[str]:
    """Modules of ours that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name in MODULES and name != "qswin"}


IMPORTS = {name: imports_of(file) - {name} for name, file in MODULES.items() if name != "qswin"}


def folder_of(module: str) -> str:
    """qat.quant, of all that is below it too."""
    return ".".join(MODULES[module].parent.relative_to(ROOT).parts[:2])


def test_the_files_import_each_other():
    assert sum(map(len, IMPORTS.values())) > 200  # the tests below see imports at all


def test_imports_form_no_cycle():
    TopologicalSorter(IMPORTS).prepare()


def test_folders_form_no_cycle():
    """What a folder imports does not import the folder, by whichever files."""
    graph: dict[str, set[str]] = {}
    for module, imported in IMPORTS.items():
        graph.setdefault(folder_of(module), set()).update(folder_of(name) for name in imported)
    TopologicalSorter({folder: used - {folder} for folder, used in graph.items()}).prepare()


@pytest.mark.parametrize("module", [name for name in MODULES if name.count(".")])
def test_folders_import_what_they_may(module):
    top = folder_of(module).split(".")[0]
    if (
        top != "qswin" and module != "qswin.qat.train" and folder_of(module) != "qat.commands"
    ):  # which stand above the table
        assert {folder_of(name).split(".")[0] for name in IMPORTS[module] - BELOW} <= ALLOWED[top]


def test_what_all_may_import_imports_nothing():
    assert not any(IMPORTS[module] for module in BELOW)


def test_nothing_imports_from_the_commands():
    for module, imported in IMPORTS.items():
        if folder_of(module) != "qat.commands":
            assert not [name for name in imported if folder_of(name) == "qat.commands"], module


def test_parsed_arguments_stay_in_the_commands():
    """Libraries take what they need, or a dataclass of options."""
    for module, file in MODULES.items():
        if folder_of(module) != "qat.commands" and module != "qswin.cli":
            assert "argparse" not in file.read_text(), module


@pytest.mark.parametrize(("folder", "most"), [("qat", 8), ("models", 11), ("trt", 8), ("calib", 8)])
def test_a_folder_holds_few_files(folder, most):
    assert len([file for file in (ROOT / folder).glob("*.py") if file.name != "__init__.py"]) <= most


def test_engines_and_images_need_no_torch():
    """All of trt/, calib/ and the commands import with torch, timm and torchvision blocked."""
    free = [
        name
        for name in MODULES
        if folder_of(name).split(".")[0] in ("trt", "calib") or folder_of(name) == "qat.commands"
    ]
    blocked = "import sys; sys.modules.update(dict.fromkeys(('torch', 'timm', 'torchvision')));"
    script = blocked + "import importlib; [importlib.import_module(name) for name in sys.argv[1:]]"
    subprocess.run([sys.executable, "-c", script, *free, "qswin.cli"], cwd=ROOT, check=True)
