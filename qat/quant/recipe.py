"""Recipe: which sites are quantized, and how. Policy lives here and nowhere else.

A site is a name such as `layers.0.blocks.1.attn.qkv`. A rule's pattern matches if it is a run of whole dotted parts of
the name (`qkv`, `attn.probs`, `layers.3`), or a wildcard that matches all of it (`layers.[01].*.fc2`). Later rules win.
"""

import dataclasses
import fnmatch
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from qswin.calib.calibrators import parse_calibrator
from qswin.calib.grid import formats, grid_of
from qswin.calib.validation import NotNegative, Positive, validate
from qswin.qat.quant.quantizers import QuantSpec, TensorQuantizer

MOST_RULES = 2000  # each is compared with each site


@dataclasses.dataclass(frozen=True)
class Rule:
    """What is done with the sites that match; None leaves a setting as the recipe, or an earlier rule, has it."""

    sites: str
    quantize: bool | None = None
    weight_format: str | None = None
    activation_format: str | None = None
    weight_calibrator: str | None = None
    calibrator: str | None = None  # of activations
    amax: Positive | None = None  # of activations: a fixed range

    def __post_init__(self) -> None:
        _check(self)

    def matches(self, site: str) -> bool:
        return f".{self.sites}." in f".{site}." or fnmatch.fnmatchcase(site, self.sites)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The quantization of a whole model. `rules` start from nothing quantized.

    Formats are names that `grid_of` knows. Weights have a range for each output channel, unless `per_channel` is false,
    from `weight_calibrator`: "max" is the largest magnitude, "mse" pays below 8 bits. Activations have one range a
    site, from `calibrator`; None stands for the format's own, mse for integers and max for FP8. `dead_range` stands in
    for a range of 0, which is an error without it.
    `budget` is the largest mean KL from the float model that is accepted: calibration leaves the fewest sites in float
    that keep it. None quantizes every site. `in_float` names sites, as rules do, that stay in float whatever the rules
    say: those that calibration left there.
    """

    name: str
    rules: tuple[Rule, ...] = ()
    weight_format: str = "int8"
    activation_format: str = "int8"
    per_channel: bool = True
    weight_calibrator: str = "max"
    calibrator: str | None = None
    dead_range: Positive | None = None
    budget: NotNegative | None = None
    in_float: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check(self)
        if self.budget is not None and not self.budget >= 0:
            raise ValueError(f"recipe {self.name!r}: budget={self.budget}: a mean KL is wanted, 0 or more")
        if len(self.rules) > MOST_RULES or len(self.in_float) > MOST_RULES:
            raise ValueError(f"recipe: more than {MOST_RULES} rules or sites in float; join them by wildcards")

    def settings(self, site: str) -> dict[str, Any] | None:
        """The settings of one site, or None when it stays in float."""
        merged: dict[str, Any] = {"quantize": False}
        for rule in self.rules:
            if rule.matches(site):
                merged |= {key: value for key, value in dataclasses.asdict(rule).items() if value is not None}
        left = any(Rule(name).matches(site) for name in self.in_float)
        return merged if merged["quantize"] and not left else None

    def in_format(self, name: str) -> "Recipe":
        """The same sites in another number format. Calibrators, which were chosen for this one, become the format's.

        Raises:
            ValueError: the format is not known, or is none for weights.
        """
        grid_of(name).of_weights  # noqa: B018 (it raises)
        own: dict[str, Any] = {"weight_format": None, "activation_format": None, "calibrator": None}
        rules = tuple(dataclasses.replace(rule, **own) for rule in self.rules)
        return dataclasses.replace(self, rules=rules, weight_format=name, activation_format=name, calibrator=None)

    def leaving(self, sites: Iterable[str]) -> "Recipe":
        """The same recipe with these sites in float too."""
        return dataclasses.replace(self, in_float=(*self.in_float, *sites))

    def quantizer(self, site: str, weight: Tensor | None = None) -> nn.Module:
        """The quantizer of an activation, or of `weight`, at a site; nn.Identity where the site stays in float."""
        settings = self.settings(site)
        if settings is None:
            return nn.Identity()
        if weight is not None:
            grid = grid_of(settings.get("weight_format", self.weight_format)).of_weights
            calibrator = settings.get("weight_calibrator", self.weight_calibrator)
            spec = QuantSpec(grid, 0 if self.per_channel else None, calibrator)
            return TensorQuantizer(spec, f"{site}.weight", weight.shape).to(weight.device)
        grid = grid_of(settings.get("activation_format", self.activation_format))
        calibrator = settings.get("calibrator") or self.calibrator or grid.calibrator
        return TensorQuantizer(QuantSpec(grid, calibrator=calibrator, amax=settings.get("amax")), site)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a sidecar, such that from_dict(to_dict()) is the recipe."""
        rules = [{k: v for k, v in dataclasses.asdict(rule).items() if v is not None} for rule in self.rules]
        return {**dataclasses.asdict(self), "rules": rules, "in_float": list(self.in_float)}

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "recipe") -> "Recipe":
        """The recipe of plain data. `format: fp8`, of a recipe or a rule, stands for both formats, weights' and
        activations'; the old keys, `weight_bits: 4`, for `weight_format: int4`.

        Args:
            where: what the data come from; messages begin with it.

        Raises:
            ValueError: a key is not a setting of a recipe or of a rule, a value is of another type, or a format or
                calibrator is not known.
        """
        return validate(plain_keys(values), cls, where)


def _check(settings: Rule | Recipe) -> None:
    """Raises ValueError for a format or a calibrator that is not known."""
    if settings.activation_format is not None:
        grid_of(settings.activation_format)
    if settings.weight_format is not None:
        _ = grid_of(settings.weight_format).of_weights
    for calibrator in (settings.weight_calibrator, settings.calibrator):
        if calibrator is not None:
            parse_calibrator(calibrator)


def plain_keys(values: Any) -> Any:
    """A recipe's plain data with each format under its own key; see `Recipe.from_dict`. What is none is left alone."""
    if not isinstance(values, Mapping):
        return values
    values = dict(values)
    for old, new in (("weight_bits", "weight_format"), ("activation_bits", "activation_format")):
        if old in values and new not in values:
            values[new] = f"int{values.pop(old)}"
        if "format" in values:
            values.setdefault(new, values["format"])
    values.pop("format", None)
    if isinstance(values.get("rules"), list | tuple):
        values["rules"] = [plain_keys(rule) for rule in values["rules"]]
    return values


_WEIGHTED = (
    *("patch_embed", "attn.conv", "qkv", "proj", "fc1", "fc2", "reduction", "expand", "concat_back_dim", "head"),
    *("inner_blocks", "layer_blocks"),  # of torchvision's feature pyramid
)
_GEMM = tuple(Rule(site, quantize=True) for site in _WEIGHTED)
_ATTENTION = (Rule("attn.q", quantize=True), Rule("attn.k", quantize=True), Rule("attn.v", quantize=True))
# A row of softmax is about 1 / tokens: with a fixed range of 1, little of rows of 144 tokens and more would be left.
_PROBS = Rule("attn.probs", quantize=True, calibrator="percentile:99.99")
_RESIDUALS = (Rule("add1", quantize=True), Rule("add2", quantize=True))

_MATMULS = (*_GEMM, *_ATTENTION, _PROBS)

RECIPES = {
    "none": Recipe("none"),
    "gemm": Recipe("gemm", _GEMM),
    "attention": Recipe("attention", _MATMULS),
    "auto": Recipe("auto", _MATMULS, budget=0.01),
    "full": Recipe("full", (*_MATMULS, *_RESIDUALS)),
}


def named_recipe(name: str) -> Recipe:
    """A recipe by name: one of RECIPES, or one of them in another number format, as "attention-fp8".

    Raises:
        ValueError: there is none of that name; the names are listed.
    """
    base, dash, number_format = name.partition("-")
    if base not in RECIPES:
        raise ValueError(
            f"recipe {name!r} is not known; choose {', '.join(RECIPES)}, one of them with a format behind it, as "
            "attention-fp8, or write the recipe out as a mapping"
        )
    return dataclasses.replace(RECIPES[base].in_format(number_format), name=name) if dash else RECIPES[base]


def is_named(recipe: Recipe) -> bool:
    """Whether a recipe's name is one of `named_recipe`'s, whose rules may be for sites that a model lacks."""
    base, _, number_format = recipe.name.partition("-")
    return base in RECIPES and number_format in ("", *formats())
