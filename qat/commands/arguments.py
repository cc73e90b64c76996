"""Arguments that several commands share."""

import argparse
from pathlib import Path


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """What the commands that make a checkpoint take: --config and its overrides, --json."""
    parser.add_argument("--config", required=True, help="YAML file; see configs/")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings over the file's, e.g. data.root=DIR")
    parser.add_argument("--json", type=Path, help="write what the checkpoint's sidecar says as JSON; - is standard output")


def add_probe_arguments(parser: argparse.ArgumentParser) -> None:
    """What `open_probe` reads."""
    parser.add_argument("--checkpoint", required=True, type=Path, help="a calibrated one")
    parser.add_argument("--data", required=True, type=Path, help="folder of images, e.g. DIR/train")
    parser.add_argument("--images", type=int, default=256, help="drawn at random from the folder, and kept in memory")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--workers", type=int, default=4, help="decoding processes")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
