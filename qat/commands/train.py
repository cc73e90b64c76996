"""`qswin train`."""

import argparse
from pathlib import Path

from qswin.qat.commands.arguments import add_config_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Fine-tunes a calibrated checkpoint (QAT), or a float model with recipe=none."
    parser.epilog = (
        "example:\n  torchrun --nproc_per_node 8 -m qswin train --config configs/swin_tiny_tinyimagenet.yaml"
        " data.root=DIR init=runs/x/ptq.safetensors run=runs/x"
    )
    add_config_arguments(parser)


def main(args: argparse.Namespace) -> None:
    from qswin.qat.checkpoint import write_report
    from qswin.qat.config import load_config
    from qswin.qat.distributed import process_group
    from qswin.qat.runs import one_job
    from qswin.qat.training.trainer import Trainer

    config = load_config(args.config, args.overrides)
    if args.dry_run:
        with process_group(config.device) as ranks:
            print(Trainer(config, ranks).plan())
        return
    with process_group(config.device) as ranks, one_job(Path(config.run), ranks.main):
        path = Trainer(config, ranks).run()
        if ranks.main:
            write_report(args.json, path)
