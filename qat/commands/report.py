"""`qswin report`."""

import argparse
from pathlib import Path

from absl import logging

from qswin.calib.files import check_suffix, write_atomic, write_result
from qswin.trt.report.sections import report, save_pictures
from qswin.trt.report.webpage import page


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
    sections = report(args.run)
    content = page(f"qswin: {args.run.name}", sections).encode(errors="backslashreplace")
    write_atomic(out, content)
    count = save_pictures(sections, out.with_name(f"{out.stem}-pictures"))
    if args.json:
        write_result(args.json, "report", {"page": str(out), "bytes": len(content), "pictures": count})
    logging.info("%s: %.1f MB, %d pictures", out, len(content) / 1e6, count)
