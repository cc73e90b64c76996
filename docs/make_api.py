"""Writes docs/api.md, by task, from the docstrings of the modules that a Python user calls: python docs/make_api.py"""

import ast
import dataclasses
import importlib
import inspect
import itertools
import re
import textwrap
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import qswin

# Each task's sentence, and the modules whose functions serve it. MOVED names those that serve another task.
TASKS = {
    "Load models and images": (
        "Build a float model, read a checkpoint of any library, and prepare images.",
        "qswin.models.registry",
        "qswin.qat.foreign.convert",
        "qswin.calib.data.images",
        "qswin.calib.data.folders",
        "qswin.calib.data.batches",
    ),
    "Quantize a model": (
        "Choose a recipe and put quantizers into a model.",
        "qswin.qat.quant.recipe",
        "qswin.qat.quant.rewrite",
        "qswin.qat.quant.layers",
        "qswin.qat.quant.quantizers",
    ),
    "Calibrate ranges": (
        "Find the ranges of all quantizers from images, without training.",
        "qswin.qat.ptq.calibrate",
        "qswin.qat.ptq.ranges",
        "qswin.qat.ptq.equalization",
        "qswin.qat.ptq.choose_calibrators",
        "qswin.qat.ptq.bias_correction",
        "qswin.qat.ptq.reconstruction",
        "qswin.calib.calibrators",
        "qswin.calib.histogram_file",
        "qswin.calib.trt_cache.cache_file",
        "qswin.calib.trt_cache.offline",
    ),
    "Compare and measure": (
        "Say how far two models differ, what each site costs, how accurate a model is and how fast.",
        "qswin.qat.ptq.verdict",
        "qswin.qat.mixed_precision.sensitivity",
        "qswin.qat.mixed_precision.search",
        "qswin.trt.evaluation.evaluate",
        "qswin.trt.evaluation.segmentation",
        "qswin.trt.evaluation.compare",
        "qswin.trt.evaluation.timing",
    ),
    "Train": (
        "Train a quantized model in [your own loop](training-loops.md).",
        "qswin.qat.quant.fake_quantize",
    ),
    "Save checkpoints": (
        "Write a model and its sidecar.",
        "qswin.qat.checkpoint",
    ),
    "Export to ONNX": (
        "Make an ONNX graph of a float or quantized model.",
        "qswin.qat.export.onnx_export",
    ),
    "Build and run": (
        "Make an engine, a bundle or a model of integer kernels, and run it.",
        "qswin.trt.engines.build",
        "qswin.trt.engines.engine",
        "qswin.trt.engines.precision",
        "qswin.qat.lowering.lower",
        "qswin.qat.kernels.norm_quantize",
        "qswin.qat.kernels.linear",
        "qswin.qat.kernels.attention",
        "qswin.qat.bundle.reader",
        "qswin.qat.bundle.runner",
    ),
    "Extend qswin": ("Register a family, its quantized twins or a calibrator ([extending](extending.md)).",),
}
MOVED = {
    "qswin.qat.checkpoint": {
        "Load models and images": (
            "load_checkpoint",
            "open_checkpoint",
            "load_model",
            "load_state",
            "read_description",
            "Loaded",
        )
    },
    "qswin.qat.quant.rewrite": {"Train": ("enable", "disable", "clip_weights"), "Extend qswin": ("register_twins",)},
    "qswin.models.registry": {"Extend qswin": ("register_family",)},
    "qswin.calib.calibrators": {"Extend qswin": ("Parameter", "Calibrator", "calibrator")},
}
MODULES = [name for _, *names in TASKS.values() for name in names]
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


class Entry(NamedTuple):
    """A function or class on the page."""

    task: str
    module: str
    name: str
    member: Any

    @property
    def face(self) -> bool:
        """Whether `from qswin import ...` gives it."""
        return any(self.member is member for member in FACE.values())


def entries() -> list[Entry]:
    """All that is public, in the order of the tasks and their modules; a task's own modules come first.

    Raises:
        ValueError: MOVED names what a module lacks; or the page would lack a name of qswin's own.
    """
    found = []
    for task, (_, *modules) in TASKS.items():
        for module in modules:
            members = dict(public(importlib.import_module(module)))
            tasks = {name: other for other, names in MOVED.get(module, {}).items() for name in names}
            if lacking := tasks.keys() - members.keys():
                raise ValueError(f"MOVED: {module} lacks {', '.join(sorted(lacking))}")
            found += [Entry(tasks.get(name, task), module, name, member) for name, member in members.items()]
    if lacking := FACE.keys() - {each.name for each in found if each.face}:
        raise ValueError(f"TASKS: the modules lack {', '.join(sorted(lacking))} of qswin")
    return sorted(found, key=lambda each: list(TASKS).index(each.task))


def titles(found: list[Entry]) -> list[str]:
    """The headings: names. Where two would have the same anchor, with the module, and a class says that it is one."""
    count = Counter(each.name.lower() for each in found)

    def title(each: Entry) -> str:
        kind = " (class)" if inspect.isclass(each.member) else ""
        return each.name if count[each.name.lower()] == 1 else f"{each.module.split('.')[-1]}.{each.name}{kind}"

    return [title(each) for each in found]


def anchor(heading: str) -> str:
    """As GitHub and MkDocs make it."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def wrapped(text: str, indent: str) -> str:
    """Lines of 120 characters at most. Only spaces are broken at, so that links and names stay whole."""
    return textwrap.fill(text, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def entry(title: str, each: Entry) -> str:
    called = wrapped(f"{each.name}{signature(each.member)}", " " * 4)
    return f"### {title}\n\n```text\n{called}\n\n{inspect.getdoc(each.member)}\n```\n"


def contents(found: list[tuple[str, Entry]]) -> str:
    """A line for each task, with links to its functions; those of `from qswin import ...` are bold and come first."""
    lines = []
    for task in TASKS:
        names = sorted((pair for pair in found if pair[1].task == task), key=lambda pair: not pair[1].face)
        links = (f"[{title}](#{anchor(title)})" for title, _ in names)
        cells = (f"**{link}**" if each.face else link for link, (_, each) in zip(links, names, strict=True))
        lines.append(wrapped(f"- [{task}](#{anchor(task)}): {', '.join(cells)}", "  "))
    return "\n".join(lines) + "\n"


def section(task: str, found: list[tuple[str, Entry]]) -> str:
    """A task's functions: of `from qswin import ...`, then module by module, whose text stands in its own task."""
    here = [pair for pair in found if pair[1].task == task]
    parts = [f"## {task}\n\n{TASKS[task][0]}\n"]
    if names := [each.name for _, each in here if each.face]:
        parts.append(f"From `qswin`: {', '.join(f'`{name}`' for name in names)}.\n")
        parts += [entry(*pair) for pair in here if pair[1].face]
    for module, pairs in itertools.groupby((pair for pair in here if not pair[1].face), lambda pair: pair[1].module):
        text = f"\n\n{inspect.getdoc(importlib.import_module(module))}" if module in TASKS[task] else ""
        parts.append(f"From `{module}`:{text}\n")
        parts += [entry(*pair) for pair in pairs]
    return "\n".join(parts)


def page() -> str:
    """The whole page."""
    found = entries()
    titled = list(zip(titles(found), found, strict=True))
    head = "# Python API\n\nWritten by `python docs/make_api.py` from the docstrings. The README and the\n"
    head += (
        "[notebook](tutorial.ipynb) have examples. Names in bold are imported from `qswin`. The others are imported\n"
    )
    head += "from the module that is named above them.\n\n"
    return head + contents(titled) + "\n" + "\n".join(section(task, titled) for task in TASKS)


if __name__ == "__main__":
    PAGE.write_text(page())
