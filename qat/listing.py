"""The command `qswin inspect`: every quantizer of a checkpoint in one table, or the layers of an engine or ONNX file."""

import argparse

from calib.files import write_json
from trt.listing import add_arguments
from trt.listing import main as list_layers

__all__ = ["add_arguments", "main"]


def main(args: argparse.Namespace) -> None:
    if args.model.suffix != ".safetensors":
        list_layers(args)
        return
    from qat.checkpoint import load_checkpoint
    from qat.quantizers import quantizers, table

    model, _ = load_checkpoint(args.model)
    print(table(model))
    if args.json:
        rows = [{"site": q.site, "bits": q.spec.bits, "amax": q.amax.flatten().tolist()} for q in quantizers(model)]
        write_json(args.json, {"model": str(args.model), "quantizers": rows})


if __name__ == "__main__":
    from qswin import run

    run(add_arguments, main, "qat.listing")
