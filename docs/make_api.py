"""Writes docs/api.md from the docstrings of the modules that a Python user calls: python docs/make_api.py"""

import ast
import importlib
import inspect
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

MODULES = (
    *("models.registry", "qat.recipe", "qat.rewrite", "qat.ptq", "qat.quantizers", "qat.layers", "qat.functional"),
    *("qat.reconstruct", "qat.choose", "qat.correct", "qat.sensitivity", "qat.search", "qat.foreign", "qat.checkpoint"),
    *("qat.export", "qat.int8", "qat.kernels.norm_quantize", "qat.kernels.linear", "qat.kernels.attention"),
    *("calib.images", "calib.batches", "calib.folders", "calib.calibrators", "calib.histograms"),
    *("calib.cache", "calib.build_cache"),
    *("trt.build", "trt.engine", "trt.evaluate", "trt.segmentation", "trt.bench", "trt.compare", "trt.precision"),
)
PAGE = Path(__file__).with_name("api.md")
COMMAND_LINE = ("add_arguments", "main")


def public(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """The functions and classes that a module defines for others and describes, in order."""
    for name, member in vars(module).items():
        member = getattr(member, "_init_fn", member)  # of an operator of torch.library
        described = (inspect.isfunction(member) or inspect.isclass(member)) and vars(member).get("__doc__", member.__doc__)
        if described and member.__module__ == module.__name__ and not name.startswith("_") and name not in COMMAND_LINE:
            yield name, member


def signature(member: Any) -> str:
    """As it is written: (x: Tensor) -> Tensor; a class's without self."""
    node: Any = ast.parse(textwrap.dedent(inspect.getsource(member))).body[0]
    if isinstance(node, ast.ClassDef):
        found = [part for part in node.body if isinstance(part, ast.FunctionDef) and part.name == "__init__"]
        if not found:
            return ""
        node = found[0]
        node.args.args, node.returns = node.args.args[1:], None
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"({ast.unparse(node.args)}){returns}"


def entry(name: str, member: Any) -> str:
    return f"### {name}\n\n```text\n{name}{signature(member)}\n\n{inspect.getdoc(member)}\n```\n"


def section(name: str) -> str:
    module = importlib.import_module(name)
    entries = "\n".join(entry(*item) for item in public(module))
    return f"## {name}\n\n{inspect.getdoc(module)}\n\n{entries}"


def page() -> str:
    """The whole page."""
    head = "# Python API\n\nWritten by `python docs/make_api.py` from the docstrings; the README has an example.\n\n"
    return head + "\n".join(map(section, MODULES))


if __name__ == "__main__":
    PAGE.write_text(page())
