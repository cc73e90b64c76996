"""Recipes: which sites they choose, and how they are read."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from qswin.calib.grid import grid_of
from qswin.qat.quant.quantizers import TensorQuantizer
from qswin.qat.quant.recipe import RECIPES, Recipe, Rule, is_named, named_recipe


@pytest.mark.parametrize(
    ("pattern", "site", "matches"),
    [
        ("fc1", "layers.0.blocks.1.mlp.fc1", True),
        ("mlp.fc1", "layers.0.blocks.1.mlp.fc1", True),
        ("layers.0", "layers.0.blocks.1.mlp.fc1", True),
        ("layers.0", "layers.01.blocks.1.mlp.fc1", False),
        ("fc", "layers.0.blocks.1.mlp.fc1", False),
        ("attn.q", "layers.0.blocks.1.attn.qkv", False),
        ("add1", "layers.0.blocks.1.add1.branch", True),
        ("layers.[01].*.fc2", "layers.1.blocks.0.mlp.fc2", True),
        ("layers.[01].*.fc2", "layers.2.blocks.0.mlp.fc2", False),
        ("*", "head", True),
    ],
)
def test_patterns_match_whole_parts_of_a_name(pattern, site, matches):
    assert Rule(pattern).matches(site) is matches


def test_later_rules_win_setting_by_setting():
    recipe = Recipe(
        "mine",
        (
            Rule("*", quantize=True, activation_format="int6"),
            Rule("fc2", calibrator="max"),
            Rule("head", quantize=False),
        ),
    )
    settings = recipe.settings("mlp.fc2")
    assert (settings["activation_format"], settings["calibrator"]) == ("int6", "max")
    assert recipe.settings("head") is None and recipe.settings("fc1") is not None


def test_gemm_leaves_attention_and_residuals_in_float():
    gemm, full = RECIPES["gemm"], RECIPES["full"]
    for site in ("attn.q", "attn.k", "attn.v", "attn.probs", "add1.branch", "add2.shortcut"):
        assert gemm.settings(f"layers.0.{site}") is None and full.settings(f"layers.0.{site}") is not None
    assert full.settings("layers.0.attn.cpb_mlp.0") is None
    assert full.settings("layers.0.attn.probs")["calibrator"] == "percentile:99.99"


def test_quantizers_follow_the_recipe():
    weight = nn.Parameter(nn.Linear(4, 6).weight)
    rules = (Rule("fc1", quantize=True),)
    recipe = Recipe("mine", rules, weight_format="int4", activation_format="int6", per_channel=False)
    activation, of_weight = recipe.quantizer("fc1"), recipe.quantizer("fc1", weight=weight)
    assert isinstance(activation, TensorQuantizer) and isinstance(of_weight, TensorQuantizer)
    assert (activation.spec.grid, of_weight.spec.grid) == (grid_of("int6"), grid_of("int4").of_weights)
    assert of_weight.spec.axis is None
    assert isinstance(recipe.quantizer("fc2"), nn.Identity)


rules = st.builds(
    Rule, st.text(min_size=1), st.booleans(), st.sampled_from([None, "int4"]), st.none(), st.sampled_from([None, "max"])
)
formats = st.sampled_from(["int2", "int8"])


@given(st.builds(Recipe, st.text(), st.lists(rules).map(tuple), formats, per_channel=st.booleans()))
def test_a_recipe_survives_its_plain_form(recipe):
    assert Recipe.from_dict(recipe.to_dict()) == recipe


def test_the_old_keys_of_bits_are_read():
    old = {"name": "low", "weight_bits": 4, "activation_bits": 6, "rules": [{"sites": "fc1", "weight_bits": 8}]}
    new = Recipe("low", (Rule("fc1", weight_format="int8"),), weight_format="int4", activation_format="int6")
    assert Recipe.from_dict(old) == new and "weight_bits" in old


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"name": "x", "bitz": 4}, "unknown key 'bitz'"),
        ({"name": "x", "rules": [{"sites": "*", "quantise": True}]}, "unknown key 'quantise'"),
        ({"rules": []}, "name"),
        ({"name": "x", "weight_format": "int9"}, "format 'int9' is not known; choose int2"),
        ({"name": "x", "weight_bits": 1}, "format 'int1' is not known"),
        ({"name": "x", "weight_bits": 4, "weight_format": "int4"}, "unknown key 'weight_bits'"),
        ({"name": "x", "activation_format": 4}, "recipe: activation_format is 4: expected str"),
        ({"name": 7}, "recipe: name is 7: expected str"),
        ({"name": "x", "rules": 3}, "recipe: rules is 3: expected array"),
        ({"name": "x", "rules": [3]}, r"recipe: rules\[0\] is 3: expected object"),
        ({"name": "x", "rules": [{"sites": "*", "amax": -1}]}, r"rules\[0\].amax is -1: expected float > 0"),
        ({"name": "x", "rules": [{"sites": "*", "amax": float("inf")}]}, r"rules\[0\].amax is inf"),
        ({"name": "x", "dead_range": float("nan")}, "dead_range is nan"),
        ({"name": "x", "in_float": "head"}, "in_float is 'head': expected array"),
        ({"name": "x", "per_channel": "no"}, "per_channel is 'no': expected bool"),
        ([], "recipe: the whole is \\[\\]: expected object"),
        ({3: 4}, "recipe: "),
        ({"name": "x", "calibrator": "maximum"}, "calibrator 'maximum' is not known"),
        ({"name": "x", "rules": [{"sites": "fc1"}] * 2001}, "more than 2000 rules or sites in float"),
        ({"name": "x", "in_float": ["fc1"] * 2001}, "more than 2000 rules or sites in float"),
        ({"name": "x", "rules": [{"sites": "*", "weight_calibrator": "max:1"}]}, "calibrator 'max:1' is not known"),
    ],
)
def test_a_malformed_recipe_says_what_is_wrong(values, words):
    with pytest.raises(ValueError, match=words):
        Recipe.from_dict(values)


def test_an_unknown_name_lists_the_names():
    with pytest.raises(ValueError, match="none, gemm, attention, auto, full"):
        named_recipe("fast-ish")


def test_weight_ranges_follow_the_recipe():
    weight = nn.Linear(4, 6).weight
    rules = (Rule("*", quantize=True), Rule("fc2", weight_calibrator="mse"))
    for calibrator in ("max", "entropy", "percentile:99"):
        recipe = Recipe("mine", rules, weight_calibrator=calibrator)
        assert [recipe.quantizer(site, weight=weight).spec.calibrator for site in ("fc1", "fc2")] == [calibrator, "mse"]


def test_a_named_recipe_in_another_format():
    """Its calibrators, which were chosen for integers, become the format's own."""
    recipe = named_recipe("attention-fp8")
    assert recipe.name == "attention-fp8" and Recipe.from_dict(recipe.to_dict()) == recipe
    quantizer = recipe.quantizer("layers.0.blocks.0.attn.probs")
    assert (quantizer.spec.grid, quantizer.spec.calibrator) == (grid_of("fp8"), "max")
    plain = named_recipe("attention").quantizer("layers.0.blocks.0.attn.probs")
    assert plain.spec.calibrator == "percentile:99.99"
    assert named_recipe("gemm-int4").quantizer("fc1", weight=nn.Linear(4, 6).weight).spec.grid.bits == 4
    assert is_named(recipe) and not is_named(Recipe("attention-mixed")) and not is_named(Recipe("mine"))
    for name, message in (("attention-fp9", "format 'fp9' is not known"), ("some-fp8", "with a format behind it")):
        with pytest.raises(ValueError, match=message):
            named_recipe(name)
    with pytest.raises(ValueError, match="'uint8' has no negative levels"):
        named_recipe("gemm-uint8")


def test_format_stands_for_both_formats():
    written = {
        "name": "m",
        "format": "fp8",
        "rules": [{"sites": "*", "quantize": True}, {"sites": "fc2", "format": "int8"}],
    }
    recipe = Recipe.from_dict(written)
    assert (recipe.weight_format, recipe.activation_format) == ("fp8", "fp8")
    assert recipe.quantizer("mlp.fc2").spec.grid == grid_of("int8") and recipe.quantizer("fc1").spec.calibrator == "max"
    narrow = Recipe.from_dict({"name": "m", "format": "fp8", "activation_format": "int8"})
    assert (narrow.weight_format, narrow.activation_format) == ("fp8", "int8")
