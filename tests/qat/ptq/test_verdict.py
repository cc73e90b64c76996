"""The verdict: figures against SciPy and by hand, who is to blame, and what becomes of it in a job."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, rel_entr, softmax
from torch import nn

from qswin.calib.validation import validate
from qswin.qat.ptq import verdict as verdict_module
from qswin.qat.ptq.ranges import find_ranges
from qswin.qat.ptq.verdict import Comparison, Verdict, kinds, tell
from qswin.qat.quant.quantizers import quantizers
from qswin.qat.quant.recipe import RECIPES, Recipe, Rule, named_recipe
from qswin.qat.quant.rewrite import quantize
from tests.helpers import V1, fails, invoke, small_swin


@pytest.fixture
def twin(images) -> nn.Module:
    twin = quantize(
        small_swin(V1), dataclasses.replace(RECIPES["gemm"], weight_format="int3", activation_format="int3")
    )
    find_ranges(twin, [images])
    return twin


def test_its_figures_are_scipys(twin, images):
    found = Comparison(twin, [images[:3], images[3:]]).measure()
    with torch.no_grad():
        ours = twin(images).double().numpy()
    floating = small_swin(V1)
    with torch.no_grad():
        reference = floating(images).double().numpy()
    assert found.images == 4
    assert found.kl == pytest.approx(rel_entr(softmax(reference, 1), softmax(ours, 1)).sum(1).mean(), rel=1e-4)
    assert found.agreement == 100 * (ours.argmax(1) == reference.argmax(1)).mean()
    assert np.isfinite(log_softmax(ours, 1)).all()


def test_masks_agree_by_their_dice():
    """The mean over classes of 2 |A and B| / (|A| + |B|), pooled over the images."""

    class Fixed(nn.Module):
        def __init__(self, mask: torch.Tensor) -> None:
            super().__init__()
            self.logits = nn.functional.one_hot(mask, 4).permute(0, 3, 1, 2).double() * 9

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.logits[: len(x)]

    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randint(0, 3, (2, 8, 8), generator=generator) for _ in range(2))
    found = Comparison(Fixed(one), [torch.zeros(2, 3, 8, 8)], Fixed(other)).measure()
    a, b = one.numpy(), other.numpy()
    dice = [2 * ((a == c) & (b == c)).sum() / ((a == c).sum() + (b == c).sum()) for c in range(3)]
    assert found.agreement == pytest.approx(100 * np.mean(dice))


def test_kinds_are_what_recipes_call_sites():
    twin = quantize(small_swin(V1), RECIPES["full"])
    found = kinds(twin)
    wanted = {"patch_embed", "qkv", "proj", "fc1", "fc2", "reduction", "head", "add1", "add2"}
    assert set(found) == wanted | {"attn.q", "attn.k", "attn.v", "attn.probs"}
    assert sum(map(len, found.values())) == len(list(quantizers(twin)))


def test_the_site_with_a_bad_range_is_to_blame(images):
    twin = quantize(small_swin(V1), RECIPES["gemm"])
    find_ranges(twin, [images])
    twin.layers[1].blocks[0].mlp.fc2._input_quantizer._amax.fill_(1e6)
    comparison = Comparison(twin, [images])
    assert next(iter(comparison.blame(comparison.measure().kl))) == "fc2"
    assert all(q.mode.value == "quantizing" for q in quantizers(twin))


def test_a_good_one_is_said_and_a_bad_one_is_warned_of(caplog):
    caplog.set_level("INFO", logger="absl")
    tell(Verdict(64, 98.4, 0.002), "do this", strict=True)
    bad = Verdict(64, 85.0, 0.3, {"fc2": 0.01})
    tell(bad, "do this", strict=False)
    good, warned = (record for record in caplog.records)
    assert (
        good.levelname == "INFO"
        and "98.4 % agreement with float, mean KL 0.002, on 64 other images" in good.getMessage()
    )
    assert warned.levelname == "WARNING" and "to blame: fc2 (without it 0.01); do this" in warned.getMessage()
    with pytest.raises(ValueError, match="far from the float one: 85.0 %.*do this"):
        tell(bad, "do this", strict=True)
    assert not Verdict(64, 100.0, float("nan")).good
    assert validate(json.loads(json.dumps(bad.to_dict())), Verdict, "sidecar", beside=("good",)) == bad


def test_a_site_may_be_left_in_float_by_its_name():
    recipe = RECIPES["full"].leaving(["layers.0.blocks.1.add1", "layers.1.blocks.0.mlp.fc2"])
    assert recipe.settings("layers.0.blocks.1.add1.shortcut") is None
    assert recipe.settings("layers.0.blocks.1.add1.branch") is None
    assert recipe.settings("layers.0.blocks.0.add1.branch") is not None
    assert recipe.settings("layers.1.blocks.0.mlp.fc2") is None
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_the_job_writes_it_and_strict_refuses(config_file, tmp_path, capsys, monkeypatch):
    command = ["calibrate", "--config", str(config_file)]
    assert invoke(*command, "--json", tmp_path / "r.json", f"run={tmp_path / 'good'}") == 0
    verdict = json.loads((tmp_path / "r.json").read_text())["metrics"]["verdict"]
    assert verdict["good"] and verdict["images"] == 2 and verdict["agreement"] == 100
    monkeypatch.setattr(verdict_module, "KL_LIMIT", 0.0)
    assert invoke(*command, f"run={tmp_path / 'bad'}", "recipe=full") == 0
    export = ["export", "--checkpoint", tmp_path / "bad" / "ptq.safetensors", "--onnx", tmp_path / "x.onnx"]
    assert "far from the float one" in fails(capsys, *export, "--strict")
    assert not (tmp_path / "x.onnx").exists()
    line = fails(
        capsys,
        *command,
        f"run={tmp_path / 'strict'}",
        "recipe=full",
        "calibration.strict=true",
        "calibration.equalize=true",
    )
    assert "far from the float one" in line and "recipe=auto" in line
    assert not list((tmp_path / "strict").glob("*.safetensors"))


def test_rules_of_a_named_recipe_are_enough_for_auto():
    assert named_recipe("auto").rules == named_recipe("attention").rules
    assert Rule("fc2").matches("blocks.0.mlp.fc2")
