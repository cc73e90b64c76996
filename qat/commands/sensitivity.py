"""`qswin sensitivity`."""

import argparse
import sys
from pathlib import Path

from qswin.qat.commands.arguments import add_probe_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Quantizes one site (or layer) at a time, and all but it, and ranks them by what that costs."
    parser.epilog = (
        "example:\n  qswin sensitivity --checkpoint runs/x/ptq.safetensors --data DIR/train --out runs/x/sensitivity.json"
    )
    add_probe_arguments(parser)
    parser.add_argument("--by", choices=("site", "layer"), default="site")
    parser.add_argument("--out", required=True, type=Path, help="JSON; an interrupted run goes on from it")
    parser.add_argument("--plot", type=Path, help="ranked bars as a picture")
    parser.add_argument("--top", type=int, default=40, help="rows of the table and the picture")


def main(args: argparse.Namespace) -> None:
    from absl import logging

    from qswin.calib.files import sha256, write_json
    from qswin.qat.distributed import process_group
    from qswin.qat.mixed_precision.sensitivity import group_quantizers, measure_groups, open_probe, plot, start_report, table
    from qswin.qat.quant.quantizers import quantizers

    job = {"checkpoint": sha256(args.checkpoint), "images": args.images, "seed": args.seed, "by": args.by}
    report = start_report(args.out, {**job, "data": str(args.data)})
    with process_group(args.device) as ranks:
        probe = open_probe(args, str(ranks.device))
        if "all" not in report:
            report |= {"float": probe.measure([]), "all": probe.measure(list(quantizers(probe.model)))}
        measure_groups(probe, group_quantizers(probe.model, args.by), report, args.out)
    write_json(args.out, {**report, "command": sys.argv})
    print(table(report, args.top))
    if args.plot:
        plot(report, args.plot, args.top)
    logging.info("%s: %d rows", args.out, len(report["rows"]))
