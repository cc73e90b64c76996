"""Arguments that several commands share."""

import argparse
import math
from pathlib import Path

from qswin.calib.validation import shown

MOST = 10**9
MOST_WORKERS = 1024  # processes or threads of one command


def count(text: str) -> int:
    """A whole number that is not negative."""
    return _between(0, MOST, text)


def positive(text: str) -> int:
    """A whole number of 1 or more."""
    return _between(1, MOST, text)


def workers(text: str) -> int:
    """A number of processes or threads."""
    return _between(0, MOST_WORKERS, text)


def _between(least: int, most: int, text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if not least <= number <= most:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a whole number of {least} to {most}")
    return number


def above_zero(text: str) -> float:
    """A number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number <= MOST:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a number above 0, to {MOST}")
    return number


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """What the commands that make a checkpoint take: --config and its overrides, --json."""
    parser.add_argument("--config", required=True, help="YAML file; see configs/")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="settings over the file's, e.g. data.root=DIR"
    )
    parser.add_argument(
        "--json", type=Path, help="write what the checkpoint's sidecar says as JSON; - is standard output"
    )
    add_dry_run_argument(parser)


def add_dry_run_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dry-run", action="store_true", help="check every input, say what would be done, and write nothing"
    )


def add_probe_arguments(parser: argparse.ArgumentParser) -> None:
    """What the commands that probe a calibrated checkpoint take: the checkpoint and the images."""
    parser.add_argument("--checkpoint", required=True, type=Path, help="a calibrated checkpoint (.safetensors)")
    add_sample_arguments(parser, images=256, batch_size=32)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or another torch device")
    add_dry_run_argument(parser)


def add_sample_arguments(parser: argparse.ArgumentParser, images: int, batch_size: int) -> None:
    """What the commands that draw images from a folder take; the numbers are defaults."""
    parser.add_argument("--data", required=True, type=Path, help="folder of images, e.g. DIR/train")
    parser.add_argument("--images", type=count, default=images, help="how many are drawn at random")
    parser.add_argument("--batch-size", type=positive, default=batch_size, help="images of a batch")
    parser.add_argument("--seed", type=count, default=0, help="of the drawing")
    parser.add_argument("--workers", type=workers, help="decoding processes; default: one a core, 16 at most")
    parser.add_argument("--skip-unreadable", action="store_true", help="skip files that cannot be read")


def add_timeout_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--timeout", type=above_zero, help="seconds that a run in ONNX Runtime may take; default: any number"
    )


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", default="auto", help="of a checkpoint: auto, cpu, cuda, ...; cpu of a bundle: it is interpreted"
    )


def add_plugin_argument(parser: argparse.ArgumentParser) -> None:
    """Of the commands that run engines; `load_plugin` loads it before a model is opened."""
    parser.add_argument("--plugin", type=Path, help="of engines that were built from a --bundle: libqswin_trt.so")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """What opens a model file of any kind: qswin.qat.backends.registry.OpenOptions."""
    parser.add_argument("--threads", type=workers, default=0, help="compute threads of ONNX Runtime; 0: all cores")
    add_timeout_argument(parser)
    add_device_argument(parser)
    parser.add_argument("--config", help="for bare weights, which have no sidecar: the YAML file that describes them")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="a setting over --config's"
    )
