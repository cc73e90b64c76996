"""A lowered model becomes a list of our operators' launches; what is none of them is refused by name."""

import pytest
import torch
from torch import nn

from qswin.qat.bundle.assemble import assemble, specialize
from qswin.qat.bundle.contents import ALIGNMENT, Buffer
from qswin.qat.bundle.trace import trace
from qswin.qat.kernels.launch import PLANS
from qswin.qat.kernels.linear import linear_float
from qswin.qat.lowering.lower import lower
from tests.helpers import V2, twin_of
from tests.qat.bundle.small import MODEL, make_bundle


@pytest.mark.parametrize(("name", "launches"), [(None, 4 * 7 + 2 + 1 + 3), (V2, 4 * 9 + 3 + 1 + 3)], ids=["V1", "V2"])
def test_every_operator_is_a_launch(name, launches):
    """Of four blocks, a merging, the stem, the last norm, pooling and classifier."""
    bundle = (make_bundle(name) if name else make_bundle()).bundle
    assert [len(batch.launches) for batch in bundle.batches] == [launches, launches]
    assert {call.operator for call in bundle.manifest.calls[0]} <= set(PLANS)


def test_grids_are_those_of_the_launchers(made):
    """They follow the batch; kernels are shared where only numbers differ."""
    one, four = made.bundle.batches
    stem = made.bundle.manifest.kernels[one.launches[0].kernel]
    patches = 256  # 16 x 16 of an image
    assert one.launches[0].grid == (patches // stem.constants["BLOCK_M"], 1, 1)
    assert four.launches[0].grid == (4 * patches // stem.constants["BLOCK_M"], 1, 1)
    assert {launch.kernel for launch in one.launches} & {launch.kernel for launch in four.launches}


def test_the_workspace_is_reused(made):
    written = {call.result for call in made.bundle.manifest.calls[1] if call.result.space == "workspace"}
    sizes = [torch.Size(at.shape).numel() * (1 if at.dtype == "int8" else 2) for at in written]
    assert made.bundle.batches[1].workspace < sum(sizes) / 3
    assert made.bundle.manifest.calls[1][-1].result.space == "output"


def test_equal_constants_are_stored_once(made):
    """Blocks of a stage have the same token ids."""
    read = {a for launch in made.bundle.batches[0].launches for a in launch.arguments
            if isinstance(a, Buffer) and a.space == "constants"}  # fmt: skip
    assert all(buffer.offset % ALIGNMENT == 0 for buffer in read)
    token_ids = [call.arguments[5] for call in made.bundle.manifest.calls[0] if call.operator == "qswin::linear_add"]
    assert len(token_ids) == 8 and len(set(token_ids)) < 8


def test_what_triton_compiles_in_is_no_argument():
    x, weight = (
        torch.empty(1, 64, dtype=torch.int8, device="meta"),
        torch.empty(32, 64, dtype=torch.int8, device="meta"),
    )
    scale = torch.empty(32, device="meta")
    for rows, kind, count in ((1, "constexpr", 6), (32, "i32:16", 7), (33, "i32", 7)):
        specialized = specialize(PLANS["qswin::linear_quantize"](x.expand(rows, 64), weight, scale, scale))
        assert specialized.kernel.types["M"] == kind and len(specialized.arguments) == count
        assert specialized.signature == "pppppp" + "i" * (count - 6) + "pp"
    assert specialized.kernel.types["x_ptr"] == "*i8:16" and specialized.kernel.constants["K"] == 64


class Head(nn.Module):
    """What ends as a bundle's model must, after something of a test's own."""

    def __init__(self, before):
        super().__init__()
        self.before = before
        self.register_buffer("weight", torch.zeros(32, 64, dtype=torch.int8))
        self.register_buffer("scale", torch.ones(32))

    def forward(self, image):
        levels = self.before(image)
        return linear_float(levels, self.weight, self.scale, self.scale, torch.float32)


@pytest.mark.parametrize(
    ("before", "message"),
    [
        (lambda image: image.view(3, 64).to(torch.int8), r"aten\._to_copy.* computes, and is not one of the kernels"),
        (lambda image: image.view(3, 64).relu_(), r"aten\.relu_\S* computes"),
        (lambda image: torch.zeros(3, 64, dtype=torch.int8), r"aten\.zeros\S* computes"),
    ],
    ids=["cast", "in place", "made on the way"],
)
def test_other_operators_are_refused_by_name(before, message):
    with pytest.raises(ValueError, match=f"{message}.*--target inductor"):
        trace(Head(before), (1, 3, 8, 8))


def test_a_tensor_that_is_not_contiguous_is_refused():
    traced = trace(Head(lambda image: image.view(torch.int8).view(64, 12).t()[:3].expand(3, 64)), (1, 3, 8, 8))
    with pytest.raises(ValueError, match="is not contiguous"):
        assemble({1: traced}, MODEL)


@pytest.mark.parametrize(
    ("after", "message"),
    [
        (lambda logits: {"stage1": logits}, "gives no logits"),
        (lambda logits: logits.view(1, 3, 32), "gives no logits"),
        (lambda logits: logits[:1], "last layer is not one of the kernels"),
    ],
    ids=["feature maps", "another shape", "a part"],
)
def test_only_classifiers_are_taken(after, message):
    class Model(Head):
        def forward(self, image):
            return after(super().forward(image))

    with pytest.raises(ValueError, match=message):
        trace(Model(lambda image: image.view(torch.int8).view(12, 64)[:3]), (1, 3, 8, 8))


def test_a_stem_that_pads_is_refused(images):
    """It pads an image that is no whole number of patches in torch."""
    stem = lower(twin_of(images), images[:1], torch.float16).patch_embed
    stem.pads = True
    with pytest.raises(ValueError, match="aten.constant_pad_nd"):
        trace(stem, (1, 3, 31, 31))
