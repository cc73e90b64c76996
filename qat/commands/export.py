"""`qswin export`."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Writes a checkpoint as ONNX."
    parser.epilog = "example:\n  qswin export --checkpoint runs/x/qat.safetensors --onnx runs/x/int8.onnx"
    parser.add_argument("--checkpoint", required=True, type=Path)
    parser.add_argument("--onnx", required=True, type=Path, help="the file to write")
    parser.add_argument("--precision", choices=("int8", "fp32", "fp16"), default="int8")
    parser.add_argument("--opset", type=int, default=20, help="17 for TensorRT 8.x, else 18 or newer")
    parser.add_argument("--batch", default="dynamic", help="a number, or dynamic")
    parser.add_argument("--json", type=Path, help="write what was exported here too")
    parser.add_argument("--config", help="for bare weights, which have no sidecar: the YAML file that describes them")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings over --config's")


def main(args: argparse.Namespace) -> None:
    import dataclasses

    from absl import logging

    from qswin.calib.files import sha256, write_json
    from qswin.qat.checkpoint import load_model
    from qswin.qat.export.onnx_export import export_onnx, save_onnx

    if args.batch != "dynamic" and not (args.batch.isdecimal() and int(args.batch) > 0):
        raise ValueError(f"--batch {args.batch}: give a positive number, or dynamic")
    batch = None if args.batch == "dynamic" else int(args.batch)
    model, description = load_model(args.checkpoint, args.config, args.overrides)
    graph = export_onnx(model, description, args.precision, args.opset, batch)
    metadata = dataclasses.replace(description, parent=sha256(args.checkpoint)).to_dict()
    metadata |= {"precision": args.precision, "opset": args.opset}
    save_onnx(args.onnx, graph, metadata)
    counts = [node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in graph.graph]
    size = args.onnx.stat().st_size
    if args.json:
        made = {"onnx": str(args.onnx), "bytes": size, "nodes": counts.count(False), "qdq_nodes": counts.count(True)}
        write_json(args.json, {**made, **metadata})
    logging.info("%s: %d nodes and %d of Q/DQ, %.1f MB", args.onnx, counts.count(False), counts.count(True), size / 1e6)
