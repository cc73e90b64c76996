"""`qswin sensitivity`."""

import argparse
from pathlib import Path

from qswin.qat.commands.arguments import add_probe_arguments, positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Quantizes one site (or layer) at a time, and all but it, and ranks them by what that costs."
        " Images without labels will do: the KL against the float model is measured then."
    )
    parser.epilog = (
        "example:\n  qswin sensitivity --checkpoint runs/x/ptq.safetensors --data DIR/train"
        " --json runs/x/sensitivity.json"
    )
    add_probe_arguments(parser)
    parser.add_argument("--by", choices=("site", "layer"), default="site", help="what is quantized at a time")
    parser.add_argument("--json", required=True, type=Path, help="the result; an interrupted run goes on from it")
    parser.add_argument("--plot", type=Path, help="write the ranking as a PNG of bars")
    parser.add_argument("--top", type=positive, default=40, help="rows of the table and the picture")


def main(args: argparse.Namespace) -> None:
    from qswin.qat.mixed_precision.probe import ProbeImages
    from qswin.qat.mixed_precision.sensitivity import plan_sensitivity, plot, run_sensitivity, table

    images = ProbeImages(args.data, args.images, args.seed, args.batch_size, args.workers, args.skip_unreadable)
    if args.dry_run:
        print(plan_sensitivity(args.checkpoint, images, args.by, args.json, args.device))
        return
    report = run_sensitivity(args.checkpoint, images, args.by, args.json, args.device)
    print(table(report, args.top))
    if args.plot:
        plot(report, args.plot, args.top)
