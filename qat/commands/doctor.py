"""`qswin doctor`."""

import argparse
from pathlib import Path
from typing import Any

from qswin.calib.files import write_json
from qswin.qat.backends.doctor import examine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Says what this machine can do, and the command that adds what is missing."
    parser.epilog = "example:\n  qswin doctor --json doctor.json"
    parser.add_argument("--json", type=Path)


def main(args: argparse.Namespace) -> None:
    findings = examine()
    for finding in findings:
        print(f"{finding.name:<20} {finding.found or 'missing':<40} {finding.note}")
    if args.json:
        report: dict[str, Any] = {finding.name: {"found": finding.found, "note": finding.note} for finding in findings}
        write_json(args.json, report)
