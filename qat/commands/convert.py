"""`qswin convert`."""

import argparse
from pathlib import Path

from qswin.qat.commands.arguments import add_config_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Converts a checkpoint that pytorch-quantization or ModelOpt calibrated to <run>/ptq.safetensors."
    )
    parser.epilog = (
        "example:\n  qswin convert --config configs/swin_tiny_imagenet.yaml data.root=unused recipe=gemm"
        " model.checkpoint=FILE run=runs/x"
    )
    add_config_arguments(parser)


def main(args: argparse.Namespace) -> None:
    from qswin.qat.checkpoint import write_report
    from qswin.qat.config import load_config
    from qswin.qat.foreign.convert import convert
    from qswin.qat.runs import one_job

    config = load_config(args.config, args.overrides)
    with one_job(Path(config.run), main=True):
        write_report(args.json, convert(config))
