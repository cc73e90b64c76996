"""docs/examples/family.py, run as a user would run it: a family that is defined outside qswin."""

import runpy
from pathlib import Path

import onnxruntime
import pytest
import torch

from qswin.models import registry
from qswin.qat.checkpoint import load_checkpoint
from qswin.qat.quant import rewrite
from qswin.qat.quant.coverage import coverage
from qswin.qat.quant.quantizers import quantizers
from qswin.qat.quant.recipe import named_recipe

EXAMPLE = Path(__file__).resolve().parents[3] / "docs" / "examples" / "family.py"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(the folder the example wrote to, its variables); what it registered is forgotten afterwards."""
    known = registry._known(), rewrite._twins()
    before = [dict(each) for each in known]
    folder = tmp_path_factory.mktemp("family")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        torch.manual_seed(0)
        yield folder, runpy.run_path(str(EXAMPLE))
    for each, old in zip(known, before, strict=True):
        each.clear()
        each.update(old)


def test_every_site_has_a_name_that_the_recipes_know(run):
    sites = {quantizer.site.removesuffix(".weight") for quantizer in quantizers(run[1]["quantized"])}
    block = {"qkv", "proj", "attn.q", "attn.k", "attn.probs", "attn.v", "add1.shortcut", "add1.branch"}
    assert sites == {"patch_embed", "head"} | {f"blocks.{i}.{site}" for i in range(2) for site in block}


def test_all_of_it_is_quantized(run):
    covered = coverage(run[1]["quantized"])
    counts = (covered.linears, covered.convolutions, covered.matmuls, covered.adds)
    assert counts == ((5, 5), (1, 1), (4, 4), (2, 2)) and not covered.in_float and not covered.attention


@torch.no_grad()
def test_the_twin_computes_what_the_model_does(run):
    images = torch.randn(2, 3, 32, 32)
    twin = rewrite.quantize(run[1]["model"], named_recipe("full"))
    torch.testing.assert_close(twin(images), run[1]["model"](images), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_the_checkpoint_and_the_graph_are_the_quantized_model(run):
    folder, names = run
    images = torch.randn(4, 3, 32, 32)
    expected = names["quantized"](images)
    assert not torch.allclose(expected, names["model"](images), rtol=1e-3, atol=1e-4)
    assert torch.equal(load_checkpoint(folder / "toy.safetensors")[0](images), expected)
    options = onnxruntime.SessionOptions()  # integer kernels saturate on processors without VNNI
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(folder / "toy.onnx"), options, providers=["CPUExecutionProvider"])
    (found,) = session.run(["logits"], {"input": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)


def test_its_settings_and_nearest_names_are_known_too(run):
    assert registry.family_of("toy").name == "toy"
    with pytest.raises(ValueError, match="nearest names are toy"):
        registry.build_model("toys")
    with pytest.raises(ValueError, match="model 'toy': 'depth' is not a setting of the architecture; there are dim"):
        registry.build_model("toy", depth=3)


def test_another_familys_model_names_are_not_taken(run):
    family = run[1]["Family"]
    rival = family("rival", "classification", lambda: ["toy"], run[1]["build"], run[1]["preprocessing"])
    with pytest.raises(ValueError, match="model name 'toy' belongs to family 'toy'"):
        registry.register_family(rival)
