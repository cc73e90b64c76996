"""`qswin report`."""

import argparse
from pathlib import Path

from absl import logging

from qswin.calib.files import check_suffix, write_result
from qswin.trt.report.sections import write_report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "One self-contained HTML page of what a run's folder holds: accuracy, speed, training, sensitivity, ranges,"
        " histograms. Its pictures are also written beside it, as PNGs, in a folder named after the page."
    )
    parser.epilog = "example:\n  qswin report runs/x"
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument(
        "--out", type=Path, help="the page to write, a name that ends in .html; default: RUN/report.html"
    )
    parser.add_argument("--json", type=Path, help="write the page's name and size as JSON; - is standard output")


def main(args: argparse.Namespace) -> None:
    out = args.out or args.run / "report.html"
    check_suffix("--out", out, (".html",))
    size, pictures = write_report(args.run, out)
    if args.json:
        write_result(args.json, "report", {"page": str(out), "bytes": size, "pictures": pictures})
    logging.info("%s: %.1f MB, %d pictures", out, size / 1e6, pictures)
