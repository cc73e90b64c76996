"""`qswin evaluate`."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Acc@1 and Acc@5 over a folder of images, one folder a class; of a segmentation model Dice and HD95 over"
        " images/ and masks/."
    )
    parser.epilog = "example:\n  qswin evaluate --model runs/x/int8.onnx --data DIR/val --json runs/x/int8.json"
    parser.add_argument("--model", required=True, type=Path, help="a checkpoint (.safetensors), an .onnx file or an engine")
    parser.add_argument("--data", required=True, type=Path, help="folder of images, e.g. DIR/val")
    parser.add_argument("--json", type=Path, help="write the result here too")
    parser.add_argument("--images", type=int, default=0, help="evaluate this many, evenly spread; 0: all")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--workers", type=int, default=4, help="decoding processes")
    parser.add_argument("--threads", type=int, default=0, help="compute threads of ONNX Runtime; 0: all cores")
    parser.add_argument("--skip_unreadable", action="store_true", help="count and skip files that cannot be read")
    parser.add_argument("--pictures", type=Path, help="folder for pictures of the worst images; of segmentation, with masks")
    parser.add_argument("--worst", type=int, default=8, help="how many pictures")
    parser.add_argument("--device", default="auto", help="of a checkpoint: auto, cpu, cuda, ...")
    parser.add_argument("--config", help="for bare weights, which have no sidecar: the YAML file that describes them")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings over --config's")


def main(args: argparse.Namespace) -> None:
    from qswin.qat.backends.inductor import SUFFIX, Package
    from qswin.trt.evaluation.evaluate import evaluate_folder, open_predictor

    if args.model.suffix == SUFFIX:
        evaluate_folder(Package(args.model), args)
        return
    if args.model.suffix not in (".safetensors", ".pth", ".pt", ".bin"):
        evaluate_folder(open_predictor(args.model, args.threads), args)
        return
    from qswin.qat.backends.torch_predictor import TorchPredictor
    from qswin.qat.checkpoint import load_model
    from qswin.qat.distributed import process_group

    with process_group(args.device) as ranks:
        model, description = load_model(args.model, args.config, args.overrides)
        evaluate_folder(TorchPredictor(model, description, str(ranks.device)), args)
