"""`qswin bench`."""

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from qswin.calib.files import write_result
from qswin.qat.backends.registry import OpenOptions, backend_of, time_model
from qswin.qat.commands.arguments import add_model_arguments, add_plugin_argument, count, positive
from qswin.trt.engines.plugin import load_plugin
from qswin.trt.evaluation.timing import TimingOptions, parse_batch_sizes, plot, table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Times models side by side: engines, packages, ONNX files (ONNX Runtime) and checkpoints (torch)."
    )
    parser.epilog = (
        "example:\n  qswin bench --model runs/x/int8.engine runs/x/int8.onnx --batch-sizes 1,16,64"
        " --json runs/x/bench.json"
    )
    parser.add_argument("--model", required=True, nargs="+", type=Path, help="model files of any kind")
    parser.add_argument("--batch-sizes", default="1,4,8,16,32,64,256", help="a model skips those that it does not take")
    parser.add_argument(
        "--warmup", type=count, default=20, help="runs that do not count; on a CPU 1 in torch, 2 in ONNX Runtime"
    )
    parser.add_argument("--repeats", type=positive, default=100, help="runs that count")
    parser.add_argument("--cpu-repeats", type=positive, default=5, help="repeats at most, on a CPU")
    parser.add_argument("--cuda-graph", action="store_true", help="also time engines and packages as CUDA graphs")
    parser.add_argument("--compile", action="store_true", help="also time checkpoints under torch.compile")
    parser.add_argument("--json", type=Path, help="write the rows here too; - is standard output")
    parser.add_argument("--plot", type=Path, help="write a PNG of images/s over the batch")
    add_model_arguments(parser)
    add_plugin_argument(parser)


def main(args: argparse.Namespace) -> None:
    if args.plugin:
        load_plugin(args.plugin)
    opening = OpenOptions(args.threads, args.device, args.config, tuple(args.overrides), args.timeout)
    timing = TimingOptions(args.warmup, args.repeats, args.cpu_repeats, args.cuda_graph, args.compile)
    batch_sizes = parse_batch_sizes(args.batch_sizes)
    for path in args.model:
        backend_of(path)  # before the first is timed
    models = tqdm(args.model, "bench", disable=not sys.stderr.isatty())
    rows = [row for path in models for row in time_model(path, batch_sizes, opening, timing)]
    if not rows:
        raise ValueError(f"no model takes a batch of {args.batch_sizes}")
    print(table(rows))
    if args.json:
        write_result(args.json, "timing", {"rows": rows})
    if args.plot:
        plot(rows, args.plot)
