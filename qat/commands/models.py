"""`qswin models`."""

import argparse
import fnmatch
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Lists the models that can be quantized, by family. Their weights may be of other libraries."
    parser.epilog = "example:\n  qswin models 'swinv2_*'"
    parser.add_argument("pattern", nargs="?", default="*", help="names to list, with * and ?; default: all")
    parser.add_argument("--json", type=Path, help="write the list here too; - is standard output")


def main(args: argparse.Namespace) -> None:
    from qswin.calib.files import write_result
    from qswin.models.registry import families, family_of

    found = [
        {"family": family.name, "task": family.task, "model": name}
        for family in families()
        for name in fnmatch.filter(sorted(family.names()), args.pattern)
    ]
    if not found:
        family_of(args.pattern)  # which says what comes nearest
    print("\n".join(f"{row['family']:<10} {row['task']:<15} {row['model']}" for row in found))
    if args.json:
        write_result(args.json, "models", {"rows": found})
