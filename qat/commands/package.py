"""`qswin package`."""

import argparse
from pathlib import Path

from absl import logging

from qswin.calib.files import write_result
from qswin.trt.package.folder import write_package


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Makes a folder to deploy of a run's model files: with labels, preprocessing, a client, a C++ example for"
        " bundles, Dockerfiles and a README with the run's figures; on request also a model repository for the Triton"
        " Inference Server."
    )
    parser.epilog = (
        "example:\n  qswin package runs/x --out deploy\n  qswin package runs/x --out deploy --only int8.onnx --triton"
    )
    parser.add_argument("run", type=Path, help="the run's folder, with ONNX files, engines, packages or bundles")
    parser.add_argument("--out", required=True, type=Path, help="the folder to make; it must be new, or empty")
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", default=[], help="model files of the run to take; default: all"
    )
    parser.add_argument("--triton", action="store_true", help="with a model repository, OUT/models")
    parser.add_argument("--json", type=Path, help="write what is in the folder as JSON; - is standard output")


def main(args: argparse.Namespace) -> None:
    artefacts = write_package(args.run, args.out, args.only, args.triton)
    names = [artefact.path.name for artefact in artefacts]
    if args.json:
        write_result(args.json, "deployment", {"folder": str(args.out), "models": names, "triton": args.triton})
    logging.info("%s: %s; see its README.md", args.out, ", ".join(names))
