"""quantize(model, recipe): every module that has a quantized twin is swapped for it."""

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from qswin.models.state_dicts import rename
from qswin.qat.quant.layers import MakeQuantizer, QuantConv2d, QuantLinear, weight_quantizers
from qswin.qat.quant.quantizers import quantizers
from qswin.qat.quant.recipe import RECIPES, Recipe
from qswin.qat.quant.twins import cvt, swin, swin_unet, vit

# Keys are types, or their names where importing the type is expensive.
TWINS: dict[Any, Callable[..., nn.Module]] = {nn.Linear: QuantLinear, nn.Conv2d: QuantConv2d}
for family in (swin, vit, swin_unet, cvt):
    TWINS.update(family.TWINS)
# Sites that are not named as their module is: (pattern of the module's path, what it becomes).
SITES = (
    (r"^patch_embed\.proj$", "patch_embed"),
    (r"^head\.fc$", "head"),
    (r"^output$", "head"),
    *cvt.SITES,
)


def quantize(model: nn.Module, recipe: Recipe) -> nn.Module:
    """A copy of `model` made of quantized twins, its quantizers off and not yet calibrated.

    The copy computes what `model` computes until its quantizers are switched on. Calibrate it (`calibrate`) or load
    calibrated ranges, then `enable` it.

    Raises:
        ValueError: a rule of the recipe matches no site of this model.
    """
    sites: list[str] = []

    def quantizer(site: str, weight: Tensor | None = None) -> nn.Module:
        sites.append(site)
        return recipe.quantizer(site, weight)

    twin = _rewrite(copy.deepcopy(model), "", quantizer)
    # A named recipe serves every family and may name sites that this model has not; a written one is meant for it.
    for rule in recipe.rules:
        if recipe.name not in RECIPES and rule.quantize and not any(map(rule.matches, sites)):
            raise ValueError(f"recipe {recipe.name!r}: {rule.sites!r} matches no site of this model")
    return twin


def _rewrite(module: nn.Module, path: str, quantizer: MakeQuantizer) -> nn.Module:
    """Children first: a block's twin takes over the twins of its linears."""
    for name, child in module.named_children():
        setattr(module, name, _rewrite(child, f"{path}.{name}".lstrip("."), quantizer))
    kind = type(module)
    twin = TWINS.get(kind) or TWINS.get(f"{kind.__module__}.{kind.__qualname__}")
    return module if twin is None else twin(module, rename(path, SITES), quantizer).train(module.training)


def enable(model: nn.Module) -> None:
    """Switches every quantizer to quantizing. Raises ValueError, naming the site, where a range is missing or dead."""
    for quantizer in quantizers(model):
        quantizer.quantize()


def disable(model: nn.Module, quiet: bool = False) -> None:
    """Switches every quantizer off: the model computes in float, and warns of it once where it is calibrated.

    Args:
        quiet: no warning; the model is meant to compute in float.
    """
    for quantizer in quantizers(model):
        quantizer.off(quiet)


def fold_biases(model: nn.Module) -> None:
    """Turns each block's position bias and shift mask into one constant, for inference."""
    for module in model.modules():
        if isinstance(module, swin.QuantSwinBlock):
            module.fold()


def clip_weights(model: nn.Module) -> None:
    """Clips weights to what their grid can express, which changes nothing for a model that quantizes them.

    It is for export: where a weight's range is below its largest value, QuantizeLinear saturates at -128, but the narrow
    grid of weights ends at -127.
    """
    for quantizer, weight in weight_quantizers(model):
        grid, scale = quantizer.spec.grid, quantizer.scale.detach()
        weight.data.clamp_(grid.qmin * scale, grid.qmax * scale)
