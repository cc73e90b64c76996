"""`qswin calibrate`."""

import argparse
from pathlib import Path

from qswin.qat.commands.arguments import add_config_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Quantizes and calibrates a trained model; writes <run>/ptq.safetensors and its sidecar."
    parser.epilog = (
        "example:\n  qswin calibrate --config configs/swin_tiny_tinyimagenet.yaml"
        " data.root=DIR model.checkpoint=FILE run=runs/x"
    )
    add_config_arguments(parser)
    parser.add_argument("--strict", action="store_true", help="a bad verdict is an error, as calibration.strict=true")


def main(args: argparse.Namespace) -> None:
    from qswin.qat.checkpoint import write_report
    from qswin.qat.config import load_config
    from qswin.qat.distributed import process_group
    from qswin.qat.ptq.job import plan_calibration, run_calibration
    from qswin.qat.runs import one_job

    strict = ["calibration.strict=true"] if args.strict else []
    config = load_config(args.config, [*args.overrides, *strict])
    if args.dry_run:
        with process_group(config.device) as ranks:
            print(plan_calibration(config, ranks))
        return
    with process_group(config.device) as ranks, one_job(Path(config.run), ranks.main):
        path = run_calibration(config, ranks)
        if ranks.main:
            write_report(args.json, path)
