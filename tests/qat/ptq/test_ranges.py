"""Calibration: one pass, whatever the batches, whatever the ranks."""

import dataclasses
import warnings

import pytest
import torch

from qswin.qat.ptq.ranges import find_ranges, set_ranges
from qswin.qat.quant.quantizers import quantizers
from qswin.qat.quant.recipe import Recipe, Rule, named_recipe
from qswin.qat.quant.rewrite import disable, quantize
from tests.helpers import V2, small_swin


def ranges(model) -> dict[str, torch.Tensor]:
    return {quantizer.site: quantizer.amax.clone() for quantizer in quantizers(model)}


def assert_same(first, second):
    torch.testing.assert_close(first, second, rtol=1e-4, atol=0)


@pytest.mark.parametrize("calibrator", ["max", "mse", "percentile"])
def test_ranges_do_not_depend_on_the_batches(images, calibrator):
    model = small_swin()
    found = []
    for size in (1, 3, 4):
        twin = quantize(model, named_recipe("full"))
        assert find_ranges(twin, images.split(size)) == 4
        set_ranges(twin, calibrator)
        found.append(ranges(twin))
    assert_same(found[0], found[1])
    assert_same(found[0], found[2])


def test_ranges_are_those_of_the_float_activations(images):
    """Nothing is quantized while ranges are taken, and max is the largest activation of a hooked float model."""
    model = small_swin()
    twin = quantize(model, named_recipe("full"))
    find_ranges(twin, [images])
    set_ranges(twin, "max")
    largest = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            hook = lambda _, inputs, name=name: largest.update({name: inputs[0].abs().max()})  # noqa: E731
            module.register_forward_pre_hook(hook)
    with torch.no_grad():
        model(images)
    found = ranges(twin)
    for name, value in largest.items():
        torch.testing.assert_close(found["head" if name == "head.fc" else name], value, rtol=1e-5, atol=0)


def test_several_calibrators_share_one_pass(quantized):
    by_max, by_percentile = (set_ranges(quantized, name) or ranges(quantized) for name in ("max", "percentile:90"))
    site = "layers.0.blocks.0.mlp.fc1"
    assert by_percentile[site] < by_max[site]
    assert by_percentile["layers.0.blocks.0.attn.probs"] < by_max["layers.0.blocks.0.attn.probs"] <= 1


def test_a_range_that_the_recipe_fixes_is_not_observed(images):
    twin = quantize(small_swin(), Recipe("fixed", (Rule("attn.probs", quantize=True, amax=1.0),)))
    find_ranges(twin, [images])
    set_ranges(twin, "percentile:90")
    assert {float(amax) for site, amax in ranges(twin).items() if not site.endswith(".weight")} == {1.0}


def test_no_images_is_an_error():
    with pytest.raises(ValueError, match="0 images"):
        find_ranges(quantize(small_swin(), named_recipe("full")), [])


@pytest.mark.parametrize("kind", [tuple, list])
def test_batches_of_images_and_labels_are_taken(images, kind):
    labels = torch.zeros(2, dtype=torch.long)
    twins = [quantize(small_swin(), named_recipe("full")) for _ in range(2)]
    assert find_ranges(twins[0], [kind((part, labels)) for part in images.split(2)]) == 4
    find_ranges(twins[1], images.split(2))
    torch.testing.assert_close(ranges(twins[0]), ranges(twins[1]), rtol=0, atol=0)


def test_calibrating_again_finds_the_same_ranges(images):
    """The second pass is one of the float model too, though its weights were quantized before, or switched off."""
    twin = quantize(small_swin(), dataclasses.replace(named_recipe("full"), weight_format="int3"))
    find_ranges(twin, [images])
    first = ranges(twin)
    find_ranges(twin, [images])
    torch.testing.assert_close(ranges(twin), first, rtol=0, atol=0)
    disable(twin)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        find_ranges(twin, [images])
    torch.testing.assert_close(ranges(twin), first, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("batch", "kind"), [({"pixel_values": torch.zeros(1)}, "dict"), ((), "tuple"), (["image.png"], "list"), (3, "int")]
)
def test_other_batches_are_refused_in_one_line(batch, kind):
    with pytest.raises(ValueError, match=rf"a calibration batch is a {kind}; give tensors \(N, 3, H, W\)"):
        find_ranges(quantize(small_swin(), named_recipe("full")), [batch])


def failing_loader(images):
    yield images * 100
    raise OSError("a worker died")


@pytest.mark.parametrize("earlier", ["calibrated", "uncalibrated", "off"])
@pytest.mark.parametrize(
    ("loader", "error"),
    [
        (failing_loader, OSError),
        (lambda images: [], ValueError),
        (lambda images: [images * 100, {"x": images}], ValueError),
        (lambda images: [images * 0], ValueError),  # dead ranges, after all ranges were set
        (lambda images: [images[:, :1]], RuntimeError),
        (lambda images: [images * float("nan")], ValueError),
    ],
    ids=["loader", "empty", "batch", "dead", "model", "nan"],
)
def test_a_calibration_that_fails_changes_no_quantizer(images, earlier, loader, error):
    twin = quantize(small_swin(depths=[1], num_heads=[2]), named_recipe("full"))
    torch.nn.init.zeros_(twin.patch_embed.proj.bias)
    if earlier != "uncalibrated":
        find_ranges(twin, [images])
    if earlier == "off":
        disable(twin)
    known = [(q.mode, q.warns, q.histogram, q._amax.clone()) for q in quantizers(twin)]
    with pytest.raises(error):
        find_ranges(twin, loader(images))
    for quantizer, (mode, warns, histogram, amax) in zip(quantizers(twin), known, strict=True):
        assert (quantizer.mode, quantizer.warns) == (mode, warns) and quantizer.histogram is histogram
        assert torch.equal(quantizer._amax.nan_to_num(-1), amax.nan_to_num(-1))


def test_dead_ranges_are_an_error_unless_the_recipe_mends_them(images):
    model = small_swin(V2)
    torch.nn.init.zeros_(model.layers[0].blocks[0].norm1.weight)
    torch.nn.init.zeros_(model.layers[0].blocks[0].norm1.bias)
    with pytest.raises(ValueError, match=r"layers\.0\.blocks\.0\.add1\.branch: its range is dead"):
        find_ranges(quantize(model, named_recipe("full")), [images])
    twin = quantize(model, named_recipe("full"))
    find_ranges(twin, [images], dead_range=1.0)
    assert ranges(twin)["layers.0.blocks.0.add1.branch"] == 1
