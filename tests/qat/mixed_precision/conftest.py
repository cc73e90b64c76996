"""A calibrated small Swin, as a file and as a probe."""

import pytest
import torch

from qswin.calib.data.batches import image_batches
from qswin.calib.data.folders import scan_folder
from qswin.calib.data.images import Preprocessing
from qswin.qat.checkpoint import Description, Loaded
from qswin.qat.config import load_config
from qswin.qat.distributed import process_group
from qswin.qat.mixed_precision.probe import Probe
from qswin.qat.ptq import job
from qswin.qat.ptq.ranges import find_ranges
from qswin.qat.quant.quantizers import quantizers
from qswin.qat.quant.recipe import named_recipe
from qswin.qat.quant.rewrite import quantize
from tests.helpers import lively_swin

BAD = "layers.0.blocks.1.mlp.fc2"


@pytest.fixture
def checkpoint(config_file):
    torch.save(lively_swin().state_dict(), load_config(config_file, []).model.checkpoint)
    with process_group("cpu") as ranks:
        return job.run_calibration(load_config(config_file, []), ranks)


@pytest.fixture
def probe(images, data) -> Probe:
    """A calibrated small Swin with one range that is far too small."""
    twin = quantize(lively_swin(), named_recipe("full"))
    find_ranges(twin, [images])
    next(q for q in quantizers(twin) if q.site == BAD)._amax.mul_(0.01)
    preprocessing = Preprocessing(size=(32, 32))
    folder = scan_folder("classification", data / "val")
    batches = list(image_batches(folder.samples, preprocessing, 8))
    description = Description({"name": "swin_tiny_patch4_window7_224"}, "ptq", preprocessing, folder.classes)
    return Probe(Loaded(twin, description, "0" * 64), batches, "cpu")
