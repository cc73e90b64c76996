"""`qswin quantize`."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "From a trained checkpoint and a folder of images to INT8, in one go: says what the checkpoint is, calibrates"
        " it, exports it with Q/DQ nodes beside FP32, compares the two, and writes a report. No labels are needed."
    )
    parser.epilog = "example:\n  qswin quantize --model mine.pth --data photos --out runs/mine"
    parser.add_argument("--model", required=True, type=Path, help="weights, or a folder that save_pretrained wrote")
    parser.add_argument(
        "--data", required=True, type=Path, help="folder of images: flat, a folder a class, or with train and val"
    )
    parser.add_argument("--out", "-o", required=True, type=Path, help="the run's folder, for all that it writes")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="settings of the config, e.g. recipe=gemm device=cpu"
    )
    parser.add_argument("--json", type=Path, help="write what came out as JSON; - is standard output")


def main(args: argparse.Namespace) -> None:
    from qswin.calib.files import write_result
    from qswin.qat.foreign.one_step import quantize_checkpoint

    result = quantize_checkpoint(args.model, args.data, args.out, args.overrides)
    print(result)
    if args.json:
        write_result(args.json, "quantization", result.to_dict())
