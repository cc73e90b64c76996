"""Writes docs/api.md from the docstrings of the modules that a Python user calls: python docs/make_api.py"""

import ast
import dataclasses
import importlib
import inspect
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import qswin

# In the order of the layout; the names that qswin itself gives stand first on the page, not in their modules.
MODULES = (
    "qswin.models.registry",
    "qswin.calib.data.images",
    "qswin.calib.data.folders",
    "qswin.calib.data.batches",
    "qswin.calib.calibrators",
    "qswin.calib.histogram_file",
    "qswin.calib.trt_cache.cache_file",
    "qswin.calib.trt_cache.offline",
    "qswin.qat.checkpoint",
    "qswin.qat.foreign.convert",
    "qswin.qat.quant.recipe",
    "qswin.qat.quant.rewrite",
    "qswin.qat.quant.layers",
    "qswin.qat.quant.quantizers",
    "qswin.qat.quant.fake_quantize",
    "qswin.qat.ptq.calibrate",
    "qswin.qat.ptq.ranges",
    "qswin.qat.ptq.equalization",
    "qswin.qat.ptq.verdict",
    "qswin.qat.ptq.choose_calibrators",
    "qswin.qat.ptq.bias_correction",
    "qswin.qat.ptq.reconstruction",
    "qswin.qat.mixed_precision.sensitivity",
    "qswin.qat.mixed_precision.search",
    "qswin.qat.export.onnx_export",
    "qswin.qat.lowering.lower",
    "qswin.qat.kernels.norm_quantize",
    "qswin.qat.kernels.linear",
    "qswin.qat.kernels.attention",
    "qswin.qat.bundle.reader",
    "qswin.qat.bundle.runner",
    "qswin.trt.engines.build",
    "qswin.trt.engines.engine",
    "qswin.trt.engines.precision",
    "qswin.trt.evaluation.evaluate",
    "qswin.trt.evaluation.segmentation",
    "qswin.trt.evaluation.timing",
    "qswin.trt.evaluation.compare",
)
FACE = {name: getattr(qswin, name) for name in qswin.__all__}
PAGE = Path(__file__).with_name("api.md")


def public(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """The functions and classes that a module defines for others and describes, in order."""
    for name, member in vars(module).items():
        member = getattr(member, "_init_fn", member)  # of an operator of torch.library
        described = (inspect.isfunction(member) or inspect.isclass(member)) and vars(member).get(
            "__doc__", member.__doc__
        )
        if described and member.__module__ == module.__name__ and not name.startswith("_"):
            yield name, member


def signature(member: Any) -> str:
    """As it is written: (x: Tensor) -> Tensor; a class's without self, a dataclass's by its fields."""
    node: Any = ast.parse(textwrap.dedent(inspect.getsource(member))).body[0]
    if isinstance(node, ast.ClassDef):
        found = [part for part in node.body if isinstance(part, ast.FunctionDef) and part.name == "__init__"]
        if not found:
            fields = [ast.unparse(part) for part in node.body if isinstance(part, ast.AnnAssign)]
            return f"({', '.join(fields)})" if dataclasses.is_dataclass(member) else ""
        node = found[0]
        node.args.args, node.returns = node.args.args[1:], None
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"({ast.unparse(node.args)}){returns}"


def entry(name: str, member: Any) -> str:
    return f"### {name}\n\n```text\n{name}{signature(member)}\n\n{inspect.getdoc(member)}\n```\n"


def face() -> str:
    """What `from qswin import ...` gives, in the order of the modules and by name."""
    members = sorted(FACE.items(), key=lambda item: (item[1].__module__, item[0]))
    names = "".join(f"    {name},\n" for name in qswin.__all__)
    entries = "\n".join(entry(*item) for item in members)
    return f"## qswin\n\n```python\nfrom qswin import (\n{names})\n```\n\n{entries}"


def section(name: str) -> str:
    """A module's own text, and what it defines beside the names of `face`."""
    module = importlib.import_module(name)
    entries = "\n".join(entry(*item) for item in public(module) if item[1] not in FACE.values())
    return f"## {name}\n\n{inspect.getdoc(module)}\n\n{entries}"


def contents() -> str:
    """A list of the modules, each with the first sentence of its text."""
    lines = ["- [qswin](#qswin): the names that most programs need"]
    for name in MODULES:
        about = (inspect.getdoc(importlib.import_module(name)) or "").split("\n\n")[0].replace("\n", " ")
        lines.append(f"- [{name}](#{name.replace('.', '')}): {about}")
    return "\n".join(lines) + "\n\n"


def page() -> str:
    """The whole page."""
    head = "# Python API\n\nWritten by `python docs/make_api.py` from the docstrings; the README has an example.\n\n"
    return head + contents() + "\n".join((face(), *map(section, MODULES)))


if __name__ == "__main__":
    PAGE.write_text(page())
