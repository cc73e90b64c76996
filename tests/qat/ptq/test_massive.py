"""Massive activations: residual adds whose stream has them stay in float, and the model says so."""

import numpy as np
import torch

from qswin.calib.calibrators import Histogram
from qswin.calib.data.images import Preprocessing
from qswin.qat.checkpoint import Description, load_checkpoint, save_checkpoint
from qswin.qat.ptq.calibrate import calibrate
from qswin.qat.ptq.massive import median
from qswin.qat.quant.layers import QuantAdd
from qswin.qat.quant.recipe import RECIPES
from qswin.qat.quant.rewrite import quantize, recipe_of
from tests.helpers import CLASSES, VARIANTS


def test_the_median_is_numpys():
    values = np.random.default_rng(0).standard_normal(100_001).astype(np.float32)
    histogram = Histogram()
    histogram.add(values)
    assert abs(median(histogram) - np.median(np.abs(values))) <= histogram.bin_width


def test_a_channel_of_the_stream_that_explodes_leaves_its_adds_in_float(tmp_path, caplog):
    """One output channel of a block's fc2 has a large bias: that add's branch and all streams after it are massive."""
    small = VARIANTS["vit, class token"]
    model = small.build()
    with torch.no_grad():
        model.blocks[1].mlp.fc2.bias[3] = 2000.0
    twin = quantize(model, RECIPES["full"])
    images = small.images()
    calibrate(twin, [images])
    after = [f"blocks.{i}.{add}" for i in range(2, len(model.blocks)) for add in ("add1", "add2")]
    assert recipe_of(twin).in_float == ("blocks.1.add2", *after)
    assert "have massive activations" in caplog.text and "blocks.1.add2" in caplog.text
    kept = [module for module in twin.modules() if isinstance(module, QuantAdd)]
    assert sum(isinstance(add._input_quantizer, torch.nn.Identity) for add in kept) == 1 + len(after)
    description = Description(
        {"name": small.name, "num_classes": CLASSES, **small.settings},
        "ptq",
        Preprocessing(size=(small.side, small.side)),
        recipe=recipe_of(twin),
    )
    save_checkpoint(tmp_path / "x.safetensors", twin, description)
    again, _ = load_checkpoint(tmp_path / "x.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(again(images), twin(images), rtol=0, atol=0)


def test_ordinary_streams_are_quantized(images):
    small = VARIANTS["vit, class token"]
    twin = quantize(small.build(), RECIPES["full"])
    calibrate(twin, [small.images()])
    assert recipe_of(twin) == RECIPES["full"]
