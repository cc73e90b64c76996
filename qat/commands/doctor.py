"""`qswin doctor`."""

import argparse
from pathlib import Path

from qswin.calib.files import write_result
from qswin.qat.backends.doctor import examine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Says what this machine can do, and the command that adds what is missing."
    parser.epilog = "example:\n  qswin doctor --json doctor.json"
    parser.add_argument("--json", type=Path, help="write it here too; - is standard output")


def main(args: argparse.Namespace) -> None:
    findings = examine()
    for finding in findings:
        print(f"{finding.name:<20} {finding.found or 'missing':<40} {finding.note}")
    if args.json:
        found = {finding.name: {"found": finding.found, "note": finding.note} for finding in findings}
        write_result(args.json, "doctor", {"findings": found})
