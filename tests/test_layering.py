"""What the folders may import, and that engines are evaluated where there is no torch."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("models", "calib", "trt", "qat")
FILES = [file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*.py"))]
ALLOWED = {"models": {"models"}, "calib": {"calib"}, "trt": {"trt", "calib"}, "qat": {"qat", "models", "calib", "trt"}}


def imports_of(file: Path) -> set[str]:
    """Modules of ours that a file imports, but for the guarded run at its end."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
        elif isinstance(node, ast.Import):
            names = {alias.name for alias in node.names}
        else:
            continue
        found |= {name for name in names if name.split(".")[0] in FOLDERS and is_module(name)}
    return found


def is_module(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return path.with_suffix(".py").is_file()


def module_name(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts)


def test_imports_form_no_cycle():
    TopologicalSorter({module_name(file): imports_of(file) for file in FILES}).prepare()


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_folders_import_what_they_may(file):
    folder = module_name(file).split(".")[0]
    assert {name.split(".")[0] for name in imports_of(file)} <= ALLOWED[folder]


def test_engines_and_images_need_no_torch():
    """Everything in trt/ and the torch-free half of calib/ imports with torch, timm and torchvision blocked."""
    modules = [module_name(file) for file in FILES if file.parts[-2] == "trt" and file.stem != "__init__"]
    modules += ["calib.images", "calib.calibrators", "calib.files", "qswin", "qat.evaluate"]
    blocked = "import sys; sys.modules.update(dict.fromkeys(('torch', 'timm', 'torchvision')));"
    script = blocked + "import importlib; [importlib.import_module(name) for name in sys.argv[1:]]"
    subprocess.run([sys.executable, "-c", script, *modules], cwd=ROOT, check=True)
