"""`qswin bench`."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Times models side by side: engines, ONNX files (ONNX Runtime) and checkpoints (torch)."
    parser.epilog = (
        "example:\n  qswin bench --model runs/x/int8.engine runs/x/int8.onnx --batch 1,16,64 --json runs/x/bench.json"
    )
    parser.add_argument("--model", required=True, nargs="+", type=Path)
    parser.add_argument("--batch", default="1,4,8,16,32,64,256")
    parser.add_argument("--warmup", type=int, default=20, help="runs that do not count; 2 at most in ONNX Runtime")
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--cpu-repeats", type=int, default=5, help="repeats at most, on a CPU")
    parser.add_argument("--cuda-graph", action="store_true", help="also time engines as CUDA graphs")
    parser.add_argument("--threads", type=int, default=0, help="compute threads of ONNX Runtime; 0: all cores")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="write a PNG of images/s over the batch")
    parser.add_argument("--compile", action="store_true", help="also time checkpoints under torch.compile")
    parser.add_argument("--device", default="auto", help="of checkpoints: auto, cpu, cuda, ...")
    parser.add_argument("--config", help="for bare weights, which have no sidecar: the YAML file that describes them")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="over --config's")


def main(args: argparse.Namespace) -> None:
    from qswin.qat.backends.inductor import SUFFIX
    from qswin.qat.backends.torch_timing import bench_checkpoint, bench_package
    from qswin.trt.evaluation.timing import BENCHES, bench_models

    torch_benches = {SUFFIX: bench_package, ".safetensors": bench_checkpoint, ".pth": bench_checkpoint}
    bench_models(args, {**BENCHES, **torch_benches})
