"""The command `qswin evaluate`: a checkpoint or package with torch, or an ONNX file or engine without importing it."""

import argparse
from typing import TYPE_CHECKING

import numpy as np

from qat.inductor import SUFFIX, Package
from trt import evaluate as engines

if TYPE_CHECKING:
    from torch import nn

    from qat.checkpoint import Description


class TorchPredictor:
    """A torch model as trt.evaluate.Predictor: NumPy in, NumPy out."""

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

        with torch.inference_mode():
            return self._model(torch.from_numpy(images).to(self._device)).float().cpu().numpy()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    engines.add_arguments(parser)
    parser.add_argument("--device", default="auto", help="of a checkpoint: auto, cpu, cuda, ...")
    parser.add_argument("--config", help="for bare weights, which have no sidecar: the YAML file that describes them")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings over --config's")


def main(args: argparse.Namespace) -> None:
    if args.model.suffix == SUFFIX:
        engines.evaluate_folder(Package(args.model), args)
        return
    if args.model.suffix not in (".safetensors", ".pth", ".pt", ".bin"):
        engines.main(args)
        return
    from qat.checkpoint import load_model
    from qat.distributed import process_group

    with process_group(args.device) as ranks:
        model, description = load_model(args.model, args.config, args.overrides)
        engines.evaluate_folder(TorchPredictor(model, description, str(ranks.device)), args)


if __name__ == "__main__":
    from qswin import run

    run(add_arguments, main, "qat.evaluate")
