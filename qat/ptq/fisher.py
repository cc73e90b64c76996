"""How much each element of a module's output matters to the model's prediction: the Fisher information's diagonal.

It is the squared gradient of the log likelihood with respect to the output, for classes that are drawn from the model's
own prediction (Li et al., "BRECQ", ICLR 2021, eq. 10; Wu et al., "FIMA-Q", CVPR 2025, for vision transformers). Each
image, in segmentation each pixel, has one drawn class; no label is needed. A backbone's feature maps are the means of
Gaussians, from which other maps are drawn (qat/ptq/prediction.py).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qswin.qat.ptq.prediction import drawn_likelihood, named_outputs


def fisher_weights(model: nn.Module, block: nn.Module, batches: Sequence[Tensor]) -> list[Tensor]:
    """The squared gradients at a block's output, scaled so that their mean over all batches is 1.

    Args:
        model: gives logits or feature maps, as `named_outputs` takes them.
        block: one of its modules, whose output is a tensor.

    Returns:
        For each batch, a tensor of the shape of the block's output.

    Raises:
        ValueError: the gradients are all 0, or one is not finite.
    """
    squares = [squared_gradients(model, [block], batch)[0] for batch in batches]
    mean = sum(square.sum().item() for square in squares) / sum(square.numel() for square in squares)
    if not 0 < mean < float("inf"):
        raise ValueError(
            f"the likelihood of what the float model predicts has a mean squared gradient of {mean:g} at a block; "
            "reconstruction needs two classes or more and logits that are not saturated; set reconstruct_steps to 0"
        )
    return [square.div_(mean) for square in squares]


@torch.enable_grad()
def squared_gradients(model: nn.Module, modules: Sequence[nn.Module], batch: Tensor, draws: int = 1) -> list[Tensor]:
    """The squared gradients at the output of each module, the sum over `draws` drawn predictions.

    Args:
        model: gives logits or feature maps, as `named_outputs` takes them.
        modules: of the model; each is called once and gives a tensor.
        batch: (N, 3, H, W).

    Returns:
        For each module, a tensor of the shape of its output.
    """
    found: dict[nn.Module, Tensor] = {}

    def record(module: nn.Module, arguments: object, output: Tensor) -> None:
        found[module] = output if output.requires_grad else output.requires_grad_()

    handles = [module.register_forward_hook(record) for module in modules]
    try:
        prediction = named_outputs(model(batch))
    finally:
        for handle in handles:
            handle.remove()
    outputs = [found[module] for module in modules]
    squares = [torch.zeros_like(output) for output in outputs]
    for likelihood in drawn_likelihood(prediction, draws):
        gradients = torch.autograd.grad(likelihood, outputs, retain_graph=True, allow_unused=True)
        for square, gradient in zip(squares, gradients, strict=True):
            square += 0 if gradient is None else gradient.square()  # an output that no feature map depends on
    return squares
