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
    *(
        "qswin.models.registry",
        "qswin.qat.quant.recipe",
        "qswin.qat.quant.rewrite",
        "qswin.qat.ptq.calibrate",
        "qswin.qat.quant.quantizers",
        "qswin.qat.quant.layers",
        "qswin.qat.quant.fake_quantize",
    ),
    *(
        "qswin.qat.ptq.reconstruction",
        "qswin.qat.ptq.choose_calibrators",
        "qswin.qat.ptq.bias_correction",
        "qswin.qat.mixed_precision.sensitivity",
        "qswin.qat.mixed_precision.search",
        "qswin.qat.convert",
        "qswin.qat.checkpoint",
    ),
    *(
        "qswin.qat.export.onnx_export",
        "qswin.qat.lowering.lower",
        "qswin.qat.kernels.norm_quantize",
        "qswin.qat.kernels.linear",
        "qswin.qat.kernels.attention",
    ),
    *(
        "qswin.calib.data.images",
        "qswin.calib.data.batches",
        "qswin.calib.data.folders",
        "qswin.calib.calibrators",
        "qswin.calib.histogram_file",
    ),
    *("qswin.calib.trt_cache.cache_file", "qswin.calib.trt_cache.offline"),
    *(
        "qswin.trt.engines.build",
        "qswin.trt.engines.engine",
        "qswin.trt.evaluation.evaluate",
        "qswin.trt.evaluation.segmentation",
        "qswin.trt.evaluation.timing",
        "qswin.trt.evaluation.compare",
        "qswin.trt.engines.precision",
    ),
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
