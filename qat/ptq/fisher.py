"""How much each element of a module's output matters to the model's prediction: the Fisher information's diagonal.

It is the squared gradient of the cross entropy with respect to the output, for classes that are drawn from the model's
own prediction (Li et al., "BRECQ", ICLR 2021, eq. 10; Wu et al., "FIMA-Q", CVPR 2025, for vision transformers). Each
image, in segmentation each pixel, has one drawn class; no label is needed.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def fisher_weights(model: nn.Module, block: nn.Module, batches: Sequence[Tensor]) -> list[Tensor]:
    """The squared gradients at a block's output, scaled so that their mean over all batches is 1.

    Args:
        model: gives logits, (N, C) or (N, C, H, W).
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
            f"the cross entropy of the float model has a mean squared gradient of {mean:g} at a block's output; "
            "reconstruction needs two classes or more and logits that are not saturated; set reconstruct_steps to 0"
        )
    return [square.div_(mean) for square in squares]


@torch.enable_grad()
def squared_gradients(model: nn.Module, modules: Sequence[nn.Module], batch: Tensor, draws: int = 1) -> list[Tensor]:
    """The squared gradients at the output of each module, the sum over `draws` drawings of classes.

    Args:
        model: gives logits, (N, C) or (N, C, H, W).
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
        logits = model(batch)
    finally:
        for handle in handles:
            handle.remove()
    outputs = [found[module] for module in modules]
    classes = torch.distributions.Categorical(logits=logits.detach().movedim(1, -1))
    squares = [torch.zeros_like(output) for output in outputs]
    for _ in range(draws):
        loss = F.cross_entropy(logits, classes.sample(), reduction="sum")
        for square, gradient in zip(squares, torch.autograd.grad(loss, outputs, retain_graph=True), strict=True):
            square += gradient.square()
    return squares
