"""The command `qswin compare`: trt.compare, and packages of the target inductor too."""

import argparse
from pathlib import Path

from qat.inductor import SUFFIX, Package
from trt import compare as engines
from trt.evaluate import Predictor, open_predictor

add_arguments = engines.add_arguments


def open_model(path: Path) -> Predictor:
    """An ONNX file, an engine or a package, ready to run. Raises ValueError for a file of another kind."""
    return Package(path) if path.suffix == SUFFIX else open_predictor(path)


def main(args: argparse.Namespace) -> None:
    engines.main(args, open_model)


if __name__ == "__main__":
    from qswin import run

    run(add_arguments, main, "qat.compare")
