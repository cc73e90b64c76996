"""Fisher weights against gradients by hand."""

import pytest
import torch
from torch import nn

from qswin.qat.ptq.fisher import fisher_weights, squared_gradients


@pytest.mark.parametrize("shape", [(), (4, 4)], ids=["classes", "pixels"])
def test_weights_are_the_squared_gradients_of_drawn_classes(shape):
    """By hand: logits W y + b have the gradient W^T (p - one hot) in y; which class was drawn is found by trial."""
    layer = (lambda i, o: nn.Conv2d(i, o, 1)) if shape else nn.Linear
    model = nn.Sequential(layer(3, 8), layer(8, 4)).requires_grad_(False)
    batches = [torch.randn(count, 3, *shape) for count in (400, 1000)]
    weights = fisher_weights(model, model[0], batches)
    outputs = [model[0](batch) for batch in batches]
    assert [weight.shape for weight in weights] == [output.shape for output in outputs]
    flat, y = (torch.cat([part.movedim(1, -1).reshape(-1, 8) for part in parts]) for parts in (weights, outputs))
    matrix = model[1].weight.reshape(4, 8)
    probabilities = torch.softmax(y @ matrix.T + model[1].bias, -1)
    of_each_class = ((probabilities[:, None] - torch.eye(4)) @ matrix).square()  # (N, class, 8)
    directions = nn.functional.normalize(of_each_class, dim=-1)
    drawn = (directions * nn.functional.normalize(flat, dim=-1)[:, None]).sum(-1).argmax(-1)
    expected = of_each_class[torch.arange(len(drawn)), drawn]
    torch.testing.assert_close(flat, expected / expected.mean(), rtol=1e-4, atol=1e-5)
    assert flat.mean().item() == pytest.approx(1, rel=1e-4)
    shares = torch.bincount(drawn, minlength=4) / len(drawn)
    torch.testing.assert_close(shares, probabilities.mean(0), rtol=0, atol=0.06)


def test_a_model_of_one_class_has_no_weights():
    model = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 1)).requires_grad_(False)
    with pytest.raises(ValueError, match="two classes or more"):
        fisher_weights(model, model[0], [torch.randn(4, 3)])


def test_the_gradients_of_several_modules_and_drawings_are_found_at_once():
    """The sum over drawings of one module's squares is that of the module alone, with the same random numbers."""
    model = nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.Linear(8, 6), nn.Linear(6, 4))
    batch = torch.randn(5, 3)
    torch.manual_seed(1)
    together = squared_gradients(model, [model[0], model[2]], batch, draws=3)
    torch.manual_seed(1)
    classes = torch.distributions.Categorical(logits=model(batch))
    expected = [torch.zeros(5, 8), torch.zeros(5, 6)]
    for _ in range(3):
        drawn = classes.sample()
        first = model[0](batch)
        second = model[2](model[1](first))
        loss = nn.functional.cross_entropy(model[3](second), drawn, reduction="sum")
        for total, gradient in zip(expected, torch.autograd.grad(loss, [first, second]), strict=True):
            total += gradient.square()
    for found, wanted in zip(together, expected, strict=True):
        torch.testing.assert_close(found, wanted)
    assert all(parameter.grad is None for parameter in model.parameters())
