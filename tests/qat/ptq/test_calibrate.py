"""Calibration: one pass, whatever the batches, whatever the ranks."""

import dataclasses
import json
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch

from qswin.calib.calibrators import BINS, find_range
from qswin.calib.histogram_file import HISTOGRAMS, load_histograms
from qswin.qat.checkpoint import load_checkpoint
from qswin.qat.config import load_config
from qswin.qat.distributed import Ranks, process_group
from qswin.qat.ptq.calibrate import activation_quantizers, calibrate, set_ranges
from qswin.qat.ptq.job import run_calibration
from qswin.qat.quant.quantizers import quantizers
from qswin.qat.quant.recipe import named_recipe
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
        assert calibrate(twin, images.split(size)) == 4
        set_ranges(twin, calibrator)
        found.append(ranges(twin))
    assert_same(found[0], found[1])
    assert_same(found[0], found[2])


def test_ranges_are_those_of_the_float_activations(images):
    """Nothing is quantized while ranges are taken, and max is the largest activation of a hooked float model."""
    model = small_swin()
    twin = quantize(model, named_recipe("full"))
    calibrate(twin, [images])
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
    assert by_percentile["layers.0.blocks.0.attn.probs"] == 1  # fixed by the recipe


def test_no_images_is_an_error():
    with pytest.raises(ValueError, match="0 images"):
        calibrate(quantize(small_swin(), named_recipe("full")), [])


@pytest.mark.parametrize("kind", [tuple, list])
def test_batches_of_images_and_labels_are_taken(images, kind):
    labels = torch.zeros(2, dtype=torch.long)
    twins = [quantize(small_swin(), named_recipe("full")) for _ in range(2)]
    assert calibrate(twins[0], [kind((part, labels)) for part in images.split(2)]) == 4
    calibrate(twins[1], images.split(2))
    torch.testing.assert_close(ranges(twins[0]), ranges(twins[1]), rtol=0, atol=0)


def test_calibrating_again_finds_the_same_ranges(images):
    """The second pass is one of the float model too, though its weights were quantized before, or switched off."""
    twin = quantize(small_swin(), dataclasses.replace(named_recipe("full"), weight_format="int3"))
    calibrate(twin, [images])
    first = ranges(twin)
    calibrate(twin, [images])
    torch.testing.assert_close(ranges(twin), first, rtol=0, atol=0)
    disable(twin)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calibrate(twin, [images])
    torch.testing.assert_close(ranges(twin), first, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("batch", "kind"), [({"pixel_values": torch.zeros(1)}, "dict"), ((), "tuple"), (["image.png"], "list"), (3, "int")]
)
def test_other_batches_are_refused_in_one_line(batch, kind):
    with pytest.raises(ValueError, match=rf"a calibration batch is a {kind}; give tensors \(N, 3, H, W\)"):
        calibrate(quantize(small_swin(), named_recipe("full")), [batch])


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
        calibrate(twin, [images])
    if earlier == "off":
        disable(twin)
    known = [(q.mode, q.warns, q.histogram, q._amax.clone()) for q in quantizers(twin)]
    with pytest.raises(error):
        calibrate(twin, loader(images))
    for quantizer, (mode, warns, histogram, amax) in zip(quantizers(twin), known, strict=True):
        assert (quantizer.mode, quantizer.warns) == (mode, warns) and quantizer.histogram is histogram
        assert torch.equal(quantizer._amax.nan_to_num(-1), amax.nan_to_num(-1))


def test_dead_ranges_are_an_error_unless_the_recipe_mends_them(images):
    model = small_swin(V2)
    torch.nn.init.zeros_(model.layers[0].blocks[0].norm1.weight)
    torch.nn.init.zeros_(model.layers[0].blocks[0].norm1.bias)
    with pytest.raises(ValueError, match=r"layers\.0\.blocks\.0\.add1\.branch: its range is dead"):
        calibrate(quantize(model, named_recipe("full")), [images])
    twin = quantize(model, named_recipe("full"))
    calibrate(twin, [images], dead_range=1.0)
    assert ranges(twin)["layers.0.blocks.0.add1.branch"] == 1


def test_the_command_writes_a_checkpoint_that_loads(config_file, data):
    config = load_config(config_file, [])
    with process_group("cpu") as ranks:
        path = run_calibration(config, ranks)
    model, description = load_checkpoint(path)
    assert description.stage == "ptq" and description.recipe == named_recipe("full")
    assert description.classes == ("class0", "class1", "class2", "class3", "class4")
    assert description.metrics == {"calibration_images": 8, "unreadable_images": 0}
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 5)


def test_the_command_leaves_its_histograms(config_file):
    """Every calibrated range is the one that its calibrator takes from the histogram beside the checkpoint."""
    with process_group("cpu") as ranks:
        path = run_calibration(load_config(config_file, []), ranks)
    model, _ = load_checkpoint(path)
    found = load_histograms(path.with_name(HISTOGRAMS))
    weights = {name: found.pop(name) for name in list(found) if name.endswith("_weight_quantizer")}
    observed = {name: module for name, module in model.named_modules() if module in set(activation_quantizers(model))}
    assert set(found) == {name for name, module in observed.items() if module.spec.amax is None}
    assert {name for name, _ in model.named_modules() if name.endswith("_weight_quantizer")} == set(weights)
    for name, observation in weights.items():
        weight = model.get_parameter(name.replace("_weight_quantizer", "weight")).detach().numpy()
        shares = np.abs(weight) / np.abs(weight).max(axis=tuple(range(1, weight.ndim)), keepdims=True)
        assert observation.histogram.amax == 1 and observation.histogram.counts.sum() == weight.size
        assert (observation.histogram.counts[: BINS // 4].sum()) == (shares < 0.5).sum()  # the bins reach to 2
    for name, observation in found.items():
        spec = observed[name].spec
        assert observation.format == spec.grid.name
        expected = find_range(observation.histogram, spec.calibrator, spec.grid)
        assert observed[name].amax.item() == pytest.approx(expected, rel=1e-6)


def test_the_command_corrects_biases_and_reconstructs(config_file):
    """At 4 bits one changes the biases, the other the weights, and the checkpoint has constant ranges all the same."""
    rules = "[{sites: '*', quantize: true}]"
    recipe = f"recipe={{name: low, weight_bits: 4, activation_bits: 4, weight_calibrator: mse, rules: {rules}}}"
    states = []
    for index, extra in enumerate(([], ["calibration.correct_biases=true"], ["calibration.reconstruct_steps=4"])):
        config = load_config(config_file, [recipe, f"run={config_file.parent / str(index)}", *extra])
        with process_group("cpu") as ranks:
            model, _ = load_checkpoint(run_calibration(config, ranks))
        states.append(model.state_dict())
    assert set(states[0]) == set(states[1]) == set(states[2])
    for changed, parameter in ((1, "bias"), (2, "weight")):
        name = f"layers.0.blocks.0.attn.qkv.{parameter}"
        assert not torch.equal(states[0][name], states[changed][name])


def test_reconstruction_needs_one_process(config_file):
    config = load_config(config_file, ["calibration.reconstruct_steps=4"])
    with pytest.raises(ValueError, match="one process"):
        run_calibration(config, Ranks(0, 2, torch.device("cpu")))


def test_two_ranks_find_the_ranges_of_one_process(config_file, tmp_path):
    """Two gloo processes under torchrun, three images in one and four in the other."""
    overrides = ["calibration.images=7", "calibration.batch_size=2"]
    launch = {
        "one": [sys.executable, "-m", "qswin", "calibrate"],
        "two": [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node=2",
            "--master_port=29611",
            "-m",
            "qswin",
            "calibrate",
        ],
    }
    found = {}
    for name, command in launch.items():
        arguments = ["--config", str(config_file), *overrides, f"run={tmp_path / name}"]
        subprocess.run([*command, *arguments], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        found[name] = ranges(load_checkpoint(tmp_path / name / "ptq.safetensors")[0])
        metrics = json.loads((tmp_path / name / "ptq.safetensors.json").read_text())["metrics"]
        assert metrics["calibration_images"] == 7
    assert_same(found["one"], found["two"])


def test_unreadable_images_are_counted_when_skipped(config_file, data):
    for bad in (data / "train").glob("*/0.png"):
        bad.write_bytes(b"no image")
    with process_group("cpu") as ranks:
        with pytest.raises(ValueError, match=r"0\.png"):
            run_calibration(load_config(config_file, ["calibration.images=20"]), ranks)
        config = load_config(config_file, ["calibration.images=20", "data.skip_unreadable=true"])
        config.run += "2"
        _, description = load_checkpoint(run_calibration(config, ranks))
    assert description.metrics == {"calibration_images": 15, "unreadable_images": 5}
