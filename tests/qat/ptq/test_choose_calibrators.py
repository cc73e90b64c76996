"""Calibrators chosen by the block's output, against trying them by hand."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from qswin.qat.ptq.choose_calibrators import CANDIDATES, choose_calibrators
from qswin.qat.ptq.ranges import find_ranges
from qswin.qat.quant.blocks import block_arguments, blocks
from qswin.qat.quant.quantizers import Mode, quantizers
from qswin.qat.quant.recipe import RECIPES, Rule
from qswin.qat.quant.rewrite import disable, quantize
from tests.helpers import lively_swin

FIXED = dataclasses.replace(RECIPES["full"], rules=(*RECIPES["full"].rules, Rule("attn.probs", amax=1.0)))
LOW = dataclasses.replace(RECIPES["full"], weight_format="int4", activation_format="int4")


@pytest.mark.slow
def test_each_site_gets_what_is_best_for_its_block(images):
    twin = quantize(lively_swin(), FIXED)
    find_ranges(twin, [images])
    chosen = choose_calibrators(twin, [images])
    assert all(quantizer.mode is Mode.QUANTIZING for quantizer in quantizers(twin))
    assert len(set(chosen.values())) > 1 and "patch_embed" not in chosen
    assert not any(site.endswith(("probs", ".weight")) for site in chosen)
    disable(twin)
    block = blocks(twin)[1]
    arguments = block_arguments(twin, block, images)
    with torch.no_grad():
        expected = block(*arguments)
        for quantizer in quantizers(block):
            if quantizer.site in chosen:
                kept, errors = quantizer.amax.clone(), {}
                for calibrator in CANDIDATES:
                    quantizer.set_range_from_histogram(calibrator)
                    quantizer.enable()
                    errors[calibrator] = F.mse_loss(block(*arguments), expected).item()
                    quantizer.disable()
                quantizer.set_range_from_histogram(chosen[quantizer.site])
                assert torch.equal(quantizer.amax, kept) and errors[chosen[quantizer.site]] == min(errors.values())


@pytest.mark.slow
def test_chosen_ranges_are_better_than_the_worst(images):
    model = lively_swin()
    expected = model(images).detach()
    errors = {}
    for calibrator in ("max", "chosen"):
        twin = quantize(model, dataclasses.replace(LOW, calibrator="max"))
        find_ranges(twin, [images])
        if calibrator == "chosen":
            choose_calibrators(twin, [images])
        with torch.no_grad():
            errors[calibrator] = F.mse_loss(twin(images), expected).item()
    assert errors["chosen"] < errors["max"]
