"""The command `qswin inspect`: every quantizer of a checkpoint in one table."""

import argparse
from pathlib import Path

from qat.checkpoint import load_checkpoint
from qat.quantizers import table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Lists every quantizer of a checkpoint: site, bits, range, state."
    parser.epilog = "example:\n  qswin inspect --checkpoint runs/x/ptq.safetensors"
    parser.add_argument("--checkpoint", required=True, type=Path)


def main(args: argparse.Namespace) -> None:
    model, _ = load_checkpoint(args.checkpoint)
    print(table(model))


if __name__ == "__main__":
    from qswin import run

    run(add_arguments, main, "qat.listing")
