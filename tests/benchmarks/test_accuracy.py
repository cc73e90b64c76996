"""What benchmarks.accuracy measures, and in which order."""

import numpy as np
import pytest
import torch
from scipy.special import rel_entr, softmax

from benchmarks.accuracy import Row, kl_sum, our_recipe, our_rows, planned
from benchmarks.toolkits import modelopt_config, nncf_rows
from qswin.calib.data.images import Preprocessing
from qswin.qat.checkpoint import Description
from tests.helpers import V1

DESCRIPTION = Description({"name": V1}, "float", Preprocessing())


def rows(toolkits: list[str], *bits: str) -> list[Row]:
    return list(planned(toolkits, list(bits), DESCRIPTION))


@pytest.mark.parametrize("shape", [(6, 5), (2, 4, 3, 3)])
def test_the_divergence_is_that_of_scipy(shape: tuple[int, ...]) -> None:
    expected, found = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    reference = rel_entr(softmax(expected.double().numpy(), axis=1), softmax(found.double().numpy(), axis=1)).sum()
    np.testing.assert_allclose(kl_sum(expected, found), reference, rtol=1e-9)


def test_the_float_model_comes_first_and_reconstruction_last_at_each_width() -> None:
    found = rows(["qswin", "modelopt"], "W8A8", "W4A4")
    assert found[0].recipe == "float"
    for bits in ("W8A8", "W4A4"):
        slow = ["reconstructed" in row.recipe for row in found if row.bits == bits]
        assert sum(slow) == 2
        assert slow == sorted(slow)
    assert [row.bits for row in found[1:]] == sorted((row.bits for row in found[1:]), reverse=True)


def test_weights_are_searched_for_below_8_bits_only() -> None:
    assert our_recipe("gemm", "W8A8").weight_calibrator == "max"
    recipe = our_recipe("gemm", "W4A8")
    assert (recipe.weight_calibrator, recipe.weight_format, recipe.activation_format) == ("mse", "int4", "int8")


def test_only_rows_that_say_so_are_not_equalized() -> None:
    options = {name: make.keywords.get("options") for name, make in our_rows("W8A8").items()}
    equalized = {name: each is not None and each.equalize for name, each in options.items()}
    plain = {name for name, does in equalized.items() if not does}
    assert plain == {"gemm, not equalized", "attention, not equalized", "first system", "FasterTransformer"}


def test_toolkits_of_8_bits_have_no_rows_below() -> None:
    assert len(nncf_rows("W8A8")) == 4
    assert {row.toolkit for row in rows(["nncf", "onnxruntime"], "W4A4")} == {"torch"}


def test_widths_are_put_into_modelopts_configuration() -> None:
    published = {"quant_cfg": {"*weight_quantizer": {"num_bits": 8, "axis": 0}, "*input_quantizer": {"num_bits": 8}}}
    found = modelopt_config(published, "W4A6")["quant_cfg"]
    assert (found["*weight_quantizer"]["num_bits"], found["*input_quantizer"]["num_bits"]) == (4, 6)
    assert published["quant_cfg"]["*input_quantizer"]["num_bits"] == 8
