"""`qswin inspect`."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from qswin.calib.files import write_json
from qswin.trt.engines.layers import layer_table
from qswin.trt.engines.listing import read_layers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Lists what a model consists of: quantizers of a checkpoint, layers of an engine or ONNX file."
    parser.epilog = (
        "example:\n  qswin inspect --model runs/x/ptq.safetensors\n  qswin inspect --model runs/x/int8.engine --time"
    )
    parser.add_argument("--model", required=True, type=Path, help="a checkpoint, an .onnx file or an engine")
    parser.add_argument("--time", action="store_true", help="of each of an engine's layers")
    parser.add_argument("--json", type=Path)


def main(args: argparse.Namespace) -> None:
    if args.model.suffix == ".safetensors":
        list_quantizers(args)
        return
    layers = read_layers(args.model, args.time)
    print(layer_table(layers))
    if args.json:
        rows: list[dict[str, Any]] = [dataclasses.asdict(layer) for layer in layers]
        write_json(args.json, {"model": str(args.model), "layers": rows})


def list_quantizers(args: argparse.Namespace) -> None:
    from qswin.qat.checkpoint import load_checkpoint
    from qswin.qat.quant.quantizers import quantizers, table

    model, _ = load_checkpoint(args.model)
    print(table(model))
    if args.json:
        rows = [{"site": q.site, "format": q.spec.grid.name, "amax": q.amax.flatten().tolist()} for q in quantizers(model)]
        write_json(args.json, {"model": str(args.model), "quantizers": rows})
