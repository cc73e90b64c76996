"""What feature maps predict, against torch's distributions and gradients by hand."""

import pytest
import torch
from torch import nn

from qswin.qat.ptq.few_images import batches_of
from qswin.qat.ptq.fisher import squared_gradients
from qswin.qat.ptq.prediction import agreement, deviation, divergence, named_outputs


def test_the_deviation_of_normal_values_is_theirs_and_massive_ones_do_not_change_it():
    x = 3 * torch.randn(4, 8, 64, 64)
    assert deviation(x).item() == pytest.approx(3, rel=0.02)
    x[:, 0, :2, :2] = 1000.0
    assert deviation(x).item() == pytest.approx(3, rel=0.02)
    assert deviation(torch.zeros(2, 3, 4, 4)) > 0


def test_the_divergence_of_maps_is_that_of_gaussians():
    reference = {"stage1": torch.randn(2, 4, 5, 5).double(), "stage2": 7 * torch.randn(2, 8, 3, 3).double()}
    ours = {name: each + 0.3 * torch.randn_like(each) for name, each in reference.items()}
    normal = torch.distributions.Normal
    expected = [
        torch.distributions.kl_divergence(normal(each, deviation(each)), normal(ours[name], deviation(each))).flatten()
        for name, each in reference.items()
    ]
    torch.testing.assert_close(divergence(ours, reference), torch.cat(expected))


def test_fisher_weights_of_maps_are_their_information():
    """Of the mean of a Gaussian: J^T J / deviation**2, here of a linear map; the mean over many drawings."""
    model = nn.Sequential(nn.Linear(3, 6), nn.Linear(6, 4)).requires_grad_(False)

    class Maps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x):
            return [self.model(x)]

    batch = torch.randn(5, 3)
    (found,) = squared_gradients(Maps(), [model[0]], batch, draws=4000)
    expected = model[1].weight.square().sum(0) / deviation(model(batch)) ** 2
    torch.testing.assert_close(found / 4000, expected.expand(5, 6), rtol=0.15, atol=0)


def test_maps_agree_where_they_are_near():
    reference = [{"a": torch.randn(2, 3, 8, 8)}]
    scale = deviation(reference[0]["a"])
    moved = reference[0]["a"].clone()
    moved[:, 0] += 0.4 * scale
    moved[:, 1] += 0.6 * scale
    assert agreement([{"a": moved}], reference) == pytest.approx(100 * 2 / 3)


def test_outputs_have_names():
    x = torch.zeros(1)
    transformers = type("BackboneOutput", (), {"feature_maps": (x, x)})()
    assert list(named_outputs(x)) == ["logits"]
    assert list(named_outputs({"stage1": x, "pool": x})) == ["stage1", "pool"]
    assert list(named_outputs([x, x])) == list(named_outputs(transformers)) == ["feature0", "feature1"]
    for wrong in (None, [], {"a": 1}, "text"):
        with pytest.raises(ValueError, match="give logits, or a list or dict of feature maps"):
            named_outputs(wrong)


def test_images_of_one_size_come_together_and_large_ones_are_fewer():
    sizes = [(224, 224)] * 3 + [(64, 96)] + [(224, 224)] * 3
    images = [torch.full((3, *size), float(index)) for index, size in enumerate(sizes)]
    batches = batches_of(images, count=6, batch=4)
    assert [[int(image[0, 0, 0]) for image in batch] for batch in batches] == [[0, 1, 2, 4], [5], [3]]
    large = batches_of((torch.zeros(1, 512, 512) for _ in range(9)), count=16, batch=8)
    assert [len(batch) for batch in large] == [2, 2]
    assert [len(batch) for batch in batches_of([torch.zeros(1, 4096, 4096)] * 2, count=4, batch=4)] == [1]
