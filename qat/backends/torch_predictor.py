"""A torch model as what is evaluated: NumPy in, NumPy out."""

from typing import TYPE_CHECKING

import numpy as np

from qswin.calib.data.batches import joined

if TYPE_CHECKING:
    from torch import nn

    from qswin.qat.checkpoint import Description


class TorchPredictor:
    """A torch model on a device, as a qswin.trt.evaluation.evaluate.Predictor."""

    def __init__(self, model: "nn.Module", description: "Description", device: str) -> None:
        import torch

        self._model, self._device = model.to(device), device
        self.backend = f"torch {torch.__version__}"
        self.precision = "fp32" if description.recipe is None else description.recipe.name
        self.task = description.task
        self.preprocessing = description.preprocessing
        self.classes = None if description.classes is None else list(description.classes)
        self.batch_size: int | None = None

    def __call__(self, images: np.ndarray) -> np.ndarray:
        import torch

        from qswin.qat.ptq.prediction import named_outputs

        with torch.inference_mode():
            outputs = named_outputs(self._model(torch.from_numpy(images).to(self._device)))
        return joined([output.float().cpu().numpy() for output in outputs.values()])
