"""What of a rewritten model is quantized, and what stays in float."""

import dataclasses
from collections.abc import Iterator, Mapping

from torch import nn

from qswin.qat.quant.layers import QuantAdd, QuantConv2d, QuantMatMul
from qswin.qat.quant.quantizers import TensorQuantizer

NAMED = 3  # layers that a line of text names


@dataclasses.dataclass(frozen=True)
class Coverage:
    """What is quantized of a model that `quantize` made.

    Args:
        linears, convolutions: (quantized, all) layers with weights; a layer that has no twin counts as not quantized.
        matmuls, adds: (quantized, all) of those that twins show; one is quantized when both its inputs are.
        in_float: paths of the layers with weights that stay in float.
        attention: {class: path of its first module} of attention that has no twin, so that its matmuls stay in float.
    """

    linears: tuple[int, int]
    convolutions: tuple[int, int]
    matmuls: tuple[int, int]
    adds: tuple[int, int]
    in_float: tuple[str, ...]
    attention: Mapping[str, str]

    def __str__(self) -> str:
        """One line: the counts, and the first layers that stay in float."""
        kinds = ("linears", "convolutions", "matmuls", "adds")
        counts = ", ".join("{} of {} {}".format(*getattr(self, kind), kind) for kind in kinds)
        if not self.in_float:
            return f"{counts} are quantized; no layer with weights stays in float"
        more = ", ..." if len(self.in_float) > NAMED else ""
        named = ", ".join(self.in_float[:NAMED]) + more
        return f"{counts} are quantized; in float stay {len(self.in_float)} layers with weights ({named})"


def coverage(twin: nn.Module) -> Coverage:
    """What is quantized of a model that `quantize` made."""
    weighted = {name: module for name, module in twin.named_modules() if _has_weight(module)}
    convolutions = {name for name, module in weighted.items() if _is_convolution(module)}
    quantizers = ("_input_quantizer", "_weight_quantizer")
    quantized = {name for name, module in weighted.items() if _is_quantized(module, *quantizers)}
    return Coverage(
        linears=(len(quantized - convolutions), len(weighted.keys() - convolutions)),
        convolutions=(len(quantized & convolutions), len(convolutions)),
        matmuls=_count(twin, QuantMatMul),
        adds=_count(twin, QuantAdd),
        in_float=tuple(name for name in weighted if name not in quantized),
        attention=_attention_without_twin(twin),
    )


def _has_weight(module: nn.Module) -> bool:
    """Whether the module itself multiplies by a matrix or a kernel; looking up an embedding does not."""
    matrices = (name for name, parameter in module.named_parameters(recurse=False) if parameter.ndim > 1)
    return not isinstance(module, nn.Embedding | nn.EmbeddingBag) and any(name.endswith("weight") for name in matrices)


def _is_convolution(module: nn.Module) -> bool:
    return isinstance(module, QuantConv2d) or "Conv" in type(module).__name__


def _is_quantized(module: nn.Module, *names: str) -> bool:
    return all(isinstance(getattr(module, name, None), TensorQuantizer) for name in names)


def _count(twin: nn.Module, kind: type[nn.Module]) -> tuple[int, int]:
    found = [_is_quantized(m, "_input_quantizer", "_other_quantizer") for m in twin.modules() if isinstance(m, kind)]
    return sum(found), len(found)


def _attention_without_twin(twin: nn.Module) -> dict[str, str]:
    found: dict[str, str] = {}
    for path, module in _outside_twins(twin, ""):
        if "Attention" in type(module).__name__ and not any(isinstance(m, QuantMatMul) for m in module.modules()):
            found.setdefault(type(module).__name__, path)
    return found


def _outside_twins(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """Each module with its path, apart from what is within a module whose matmuls a twin shows."""
    if any(isinstance(child, QuantMatMul) for child in module.children()):
        return
    yield path, module
    for name, child in module.named_children():
        yield from _outside_twins(child, f"{path}.{name}".lstrip("."))
