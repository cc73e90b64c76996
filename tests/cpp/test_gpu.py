"""With a GPU: a bundle that was built for it computes what the lowered model does there, launched by Triton."""

import subprocess

import numpy as np
import pytest
import torch

from qswin.qat.backends.registry import OpenOptions, open_predictor
from qswin.qat.bundle import runner
from qswin.qat.checkpoint import load_checkpoint
from qswin.qat.lowering.lower import lower
from tests.cpp.conftest import compile_runner
from tests.helpers import invoke
from tests.qat.backends.test_bundle import HEADS_OF_32, save

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


def test_a_bundle_computes_what_the_lowered_model_does(cuda_include, images, tmp_path, monkeypatch):
    folder = compile_runner(tmp_path / "cpp", cuda_include, ("qswin", "qswin_run"))
    monkeypatch.setenv(runner.VARIABLE, str(folder / "libqswin.so"))
    runner.library.cache_clear()
    checkpoint, path = save(tmp_path / "x.safetensors", images, "attention", **HEADS_OF_32), tmp_path / "x.qsb"
    arch = "{}{}".format(*torch.cuda.get_device_capability())
    options = ("--checkpoint", checkpoint, "--engine", path, "--arch", arch, "--batch-sizes", "1,4")
    assert invoke("build", "--target", "bundle", *options) == 0
    lowered = lower(load_checkpoint(checkpoint)[0].cuda(), images[:1].cuda(), torch.float16)
    predictor = open_predictor(path, OpenOptions())
    for count in (1, 3, 4):
        with torch.inference_mode():
            expected = lowered(images[:count].cuda()).cpu().numpy()
        found = predictor(images[:count].numpy())
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3 * np.abs(expected).max())
    raw = images[:4].numpy().tobytes()
    done = subprocess.run([folder / "qswin_run", path, "4"], input=raw, capture_output=True, check=True)
    assert np.array_equal(np.frombuffer(done.stdout, dtype=np.float32).reshape(4, -1), predictor(images[:4].numpy()))
    assert invoke("bench", "--model", path, "--batch-sizes", "1,4", "--repeats", "3", "--cuda-graph") == 0
