"""quantize(model, recipe): every module that has a quantized twin is swapped for it."""

import copy
import functools
from collections.abc import Callable, Iterable, Mapping

from absl import logging
from torch import Tensor, nn

from qswin.models.discovery import offers
from qswin.models.registry import site_name
from qswin.qat.quant import twins
from qswin.qat.quant.blocks import FoldingBlock
from qswin.qat.quant.coverage import coverage
from qswin.qat.quant.layers import MakeQuantizer, QuantConv2d, QuantLinear, undo_channel_scales, weight_quantizers
from qswin.qat.quant.quantizers import TensorQuantizer, quantizers
from qswin.qat.quant.recipe import Recipe, is_named

# What makes a twin of a float module whose children are twins by now: twin(module, site, quantizer).
MakeTwin = Callable[..., nn.Module]
# Modules of other libraries whose weights load into timm's models, which have twins: {where they are defined: model}.
ELSEWHERE = {
    "torchvision.models.swin_transformer": "swin_tiny_patch4_window7_224",
    "torchvision.models.vision_transformer": "vit_base_patch16_224",
    "transformers.models.swin.modeling_swin": "swin_tiny_patch4_window7_224",
    "transformers.models.swinv2.modeling_swinv2": "swinv2_tiny_window8_256",
    "transformers.models.vit.modeling_vit": "vit_base_patch16_224",
    "transformers.models.deit.modeling_deit": "deit_base_distilled_patch16_224",
}
# Keys are types, or their dotted names where importing the type is expensive.
Twins = Mapping[type | str, MakeTwin]


@functools.cache
def _twins() -> dict[type | str, MakeTwin]:
    """The twin of each type of module: at first those of the layers, and what the modules of twins/ offer as TWINS."""
    found: dict[type | str, MakeTwin] = {nn.Linear: QuantLinear, nn.Conv2d: QuantConv2d}
    for more in offers(twins, "TWINS"):
        found |= more
    return found


def register_twins(more: Twins) -> None:
    """Makes twins known that are defined outside twins/. A type that had a twin gets the new one.

    Args:
        more: {type of a float module, or its dotted name: what makes its twin, as twin(module, site, quantizer)}. The
            type must be the module's own, not a base class. `quantizer(site)` makes the quantizer of an activation.
    """
    _twins().update(more)


def quantize(model: nn.Module, recipe: Recipe) -> nn.Module:
    """A copy of `model` made of quantized twins, its quantizers off and not yet calibrated; `recipe` is its attribute.

    The copy computes what `model` computes until its quantizers are switched on. Calibrate it (`calibrate`) or load
    calibrated ranges, then `enable` it. What the recipe covers is logged, and so is attention that it cannot reach.

    Raises:
        ValueError: the recipe quantizes no site of this model, or one of its rules matches none; or the model has a
            Swin or ViT of torchvision or transformers, whose attention would stay in float. A recipe of your own
            quantizes what its rules name of it, but of torchvision's Swin, whose attention computes outside of its
            linears.
    """
    advice = _advice(model)
    if advice is not None and any(map(_bypasses_its_linears, model.modules())):
        raise ValueError(advice)
    twin = rewrite(copy.deepcopy(model), recipe)
    if not recipe.rules:
        return twin
    covered = coverage(twin)
    if not any(quantizers(twin)):
        what, layers = f"quantizes nothing of this {type(model).__name__}", ", ".join(covered.in_float[:3])
        raise ValueError(f"recipe {recipe.name!r} {what}; write rules for its layers ({layers}, ...)")
    if covered.attention and advice is not None and is_named(recipe):
        raise ValueError(advice)
    logging.info("recipe %s: %s", recipe.name, covered)
    for kind, path in covered.attention.items():
        remedy = advice or "see register_twins"
        logging.warning("%s (first at %s) has no quantized twin: its matmuls stay in float; %s", kind, path, remedy)
    return twin


def _bypasses_its_linears(module: nn.Module) -> bool:
    """Whether it is torchvision's attention, which multiplies by its linears' weights itself, and no twin is known."""
    kind = type(module)
    torchvisions = kind.__module__ == "torchvision.models.swin_transformer" and kind.__name__.startswith(
        "ShiftedWindow"
    )
    return torchvisions and kind not in _twins()


def _advice(model: nn.Module) -> str | None:
    """What to do with a model that is built of another library's modules; None where it is not."""
    for path, module in model.named_modules():
        kind = type(module)
        if (name := ELSEWHERE.get(kind.__module__)) is not None:
            what = f"{kind.__name__} of {kind.__module__.partition('.')[0]}{f' ({path})' if path else ''}"
            load = f"qswin.build_model({name!r}, checkpoint=FILE), or the model that qswin init FILE names"
            return f"{what} has no quantized twins, timm's models have: load its weights by {load}"
    return None


def rewrite(model: nn.Module, recipe: Recipe) -> nn.Module:
    """`quantize`, but in place and without a word about what is covered. Use what is returned.

    Raises:
        ValueError: a rule of the recipe matches no site of this model.
    """
    sites: list[str] = []

    def quantizer(site: str, weight: Tensor | None = None) -> nn.Module:
        sites.append(site)
        return recipe.quantizer(site, weight)

    twin = _rewrite(model, "", quantizer)
    # A named recipe serves every family and may name sites that this model lacks; a written one is meant for it.
    for rule in recipe.rules:
        if not is_named(recipe) and rule.quantize and not any(map(rule.matches, sites)):
            raise ValueError(f"recipe {recipe.name!r}: {rule.sites!r} matches no site of this model")
    vars(twin)["recipe"] = recipe
    return twin


def recipe_of(model: nn.Module) -> Recipe:
    """The recipe of a rewritten model, which may be inside another module. Raises ValueError where there is none."""
    return vars(_recipes_holder(model))["recipe"]


def _recipes_holder(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(vars(module).get("recipe"), Recipe):
            return module
    raise ValueError(f"this {type(model).__name__} has no recipe; make it with qswin.quantize")


def _rewrite(module: nn.Module, path: str, quantizer: MakeQuantizer) -> nn.Module:
    """Children first: a block's twin takes over the twins of its linears."""
    for name, child in module.named_children():
        setattr(module, name, _rewrite(child, f"{path}.{name}".lstrip("."), quantizer))
    kind = type(module)
    twin = _twins().get(kind) or _twins().get(f"{kind.__module__}.{kind.__qualname__}")
    return module if twin is None else twin(module, site_name(path), quantizer).train(module.training)


def leave_in_float(model: nn.Module, sites: Iterable[str]) -> None:
    """Takes the quantizers of some sites out of a rewritten model, and the sites out of its recipe, in place.

    Args:
        sites: whole names: an activation's, which is also its weight's, or a residual add's, which is of both branches.
    """
    sites = tuple(sites)
    holder = vars(_recipes_holder(model))
    holder["recipe"] = holder["recipe"].leaving(sites)
    names = {f"{site}{end}" for site in sites for end in ("", ".weight", ".shortcut", ".branch")}
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, TensorQuantizer) and child.site in names:
                undo_channel_scales(module)
                setattr(module, name, nn.Identity())


def enable(model: nn.Module) -> None:
    """Switches every quantizer to quantizing. Raises ValueError, naming the site, where a range is missing or dead."""
    for quantizer in quantizers(model):
        quantizer.enable()


def disable(model: nn.Module, quiet: bool = False) -> None:
    """Switches every quantizer off: the model computes in float, and warns of it once where it is calibrated.

    Args:
        quiet: no warning; the model is meant to compute in float.
    """
    for quantizer in quantizers(model):
        quantizer.disable(quiet)


def fold_biases(model: nn.Module) -> None:
    """Turns each block's position bias and shift mask into one constant, for inference."""
    for module in model.modules():
        if isinstance(module, FoldingBlock):
            module.fold()


def clip_weights(model: nn.Module) -> None:
    """Clips weights to what their grid can express, which changes nothing for a model that quantizes them.

    It is for export: where a weight's range is below its largest value, QuantizeLinear saturates at -128, but the
    narrow grid of weights ends at -127.
    """
    for quantizer, weight in weight_quantizers(model):
        grid, scale = quantizer.spec.grid, quantizer.scale.detach()
        weight.data.clamp_(grid.qmin * scale, grid.qmax * scale)
