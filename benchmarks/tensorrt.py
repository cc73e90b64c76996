"""Swin-T on TensorRT: builds every precision, evaluates and times each engine, compares calibration caches.

    for r in gemm full: qswin calibrate --config configs/swin_tiny_tinyimagenet.yaml ... recipe=$r run=runs/$r
    qswin export --checkpoint runs/gemm/ptq.safetensors --precision fp32 --opset 17 --onnx DIR/fp32.onnx
    qswin export --checkpoint runs/gemm/ptq.safetensors --opset 17 --onnx DIR/int8-gemm.onnx   (and int8-full.onnx)
    python -m benchmarks.tensorrt --onnx DIR --data TINY_IMAGENET --out docs/results/tensorrt-8.6-h200.json

Every step is a command of its own in a process of its own, so that one that fails costs only its own figures. No torch.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from calib.cache import parse_cache
from calib.files import write_json

# name: ONNX file, precision, further arguments; the most important first
ENGINES: dict[str, tuple[str, str, list[str]]] = {
    "fp16": ("fp32", "fp16", []),
    "int8-gemm": ("int8-gemm", "int8", []),
    "int8-full": ("int8-full", "int8", []),
    "fp32": ("fp32", "fp32", []),
    "implicit-tensorrt": ("fp32", "int8", ["--calib-cache", "tensorrt.cache"]),
    "implicit-offline": ("fp32", "int8", ["--calib-cache", "offline.cache"]),
    "fp16-layernorm32": ("fp32", "fp16", ["--override", "swin-fp16"]),
    "fp16-folded": ("fp32", "fp16", ["--fold"]),
    "tf32": ("fp32", "tf32", []),
}
REFERENCES = ("fp32", "int8-gemm", "int8-full")


class Run:
    """The steps of one run, in the folder of the ONNX files; results gather in `report`."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.start = args, time.perf_counter()
        self.report: dict[str, Any] = {"commit": args.commit, "failed": {}, "builds": {}, "evaluations": {}, "rows": []}

    def command(self, module: str, *arguments: str) -> list[str]:
        return [sys.executable, "-m", f"trt.{module}", *arguments]

    def do(self, name: str, command: list[str]) -> bool:
        """Runs a command to its end; says whether it succeeded."""
        begun = time.perf_counter()
        done = subprocess.run(command, text=True, capture_output=True)
        seconds, now = time.perf_counter() - begun, time.perf_counter() - self.start
        print(f"{now:6.0f} s  {name} ({seconds:.1f} s, exit {done.returncode})", flush=True)
        if done.returncode:
            self.report["failed"][name] = done.stderr[-1500:]
            print(done.stderr[-1500:], flush=True)
        self.save()
        return done.returncode == 0

    def file(self, name: str) -> str:
        return str(self.args.onnx / name)

    def json(self, name: str) -> Any:
        return json.loads((self.args.onnx / name).read_text())

    def measured(self, name: str) -> dict[str, float]:
        """The figures of a report, without the paths of the machine."""
        return {key: value for key, value in self.json(name).items() if isinstance(value, int | float)}

    def save(self) -> None:
        write_json(self.args.out, self.report)

    def in_background(self) -> list[subprocess.Popen[bytes]]:
        """What needs the CPU only: the offline cache, and Acc@1 in ONNX Runtime."""
        commands = [self.calibration("offline", "--offline")]
        for name in REFERENCES:
            arguments = ["--threads", "4", "--json", self.file(f"{name}.ort.json")]
            commands.append(self.evaluation(f"{name}.onnx", *arguments))
        return [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for command in commands]

    def calibration(self, name: str, *arguments: str) -> list[str]:
        data = [
            "--onnx",
            self.file("fp32.onnx"),
            "--data",
            str(self.args.data / "train"),
            "--cache",
            self.file(f"{name}.cache"),
        ]
        return self.command("calib_cache", *data, "--images", str(self.args.images), "--batch", "16", *arguments)

    def evaluation(self, model: str, *arguments: str) -> list[str]:
        data = ["--model", self.file(model), "--data", str(self.args.data / "val"), "--workers", "16"]
        return self.command("evaluate", *data, "--images", str(self.args.evaluate), *arguments)

    def build(self, name: str) -> None:
        onnx, precision, further = ENGINES[name]
        further = [self.file(word) if word.endswith(".cache") else word for word in further]
        arguments = ["--onnx", self.file(f"{onnx}.onnx"), "--engine", self.file(f"{name}.engine"), "--precision", precision]
        if self.do(f"build {name}", self.command("build", *arguments, "--shapes", self.args.shapes, *further)):
            sidecar = self.json(f"{name}.json")
            kept = ("version", "gpu", "capability", "seconds", "warm_timing_cache", "overrides", "not_honoured")
            self.report["builds"][name] = {key: sidecar[key] for key in kept}

    def evaluate(self, name: str) -> None:
        command = self.evaluation(f"{name}.engine", "--json", self.file(f"{name}.eval.json"))
        if self.do(f"evaluate {name}", command):
            self.report["evaluations"][f"{name}.engine"] = self.measured(f"{name}.eval.json")
        onnx = ENGINES[name][0]
        against = ["--reference", self.file(f"{onnx}.onnx"), "--data", str(self.args.data / "val"), "--images", "64"]
        report = ["--json", self.file(f"{name}.compare.json")]
        if self.do(f"compare {name}", self.command("compare", "--model", self.file(f"{name}.engine"), *against, *report)):
            self.report.setdefault("errors", {})[name] = self.measured(f"{name}.compare.json")

    def bench(self, names: list[str]) -> None:
        models = [self.file(f"{name}.engine") for name in names]
        arguments = ["--batch", self.args.batch, "--cuda-graph", "--json", self.file("bench.json")]
        if self.do("bench", self.command("bench", "--model", *models, *arguments)):
            rows = self.json("bench.json")["rows"]
            accuracy = self.report["evaluations"]
            self.report["rows"] = [{**row, "acc1": accuracy.get(row["model"], {}).get("acc1")} for row in rows]

    def compare_caches(self) -> None:
        """Shares of the tensors of TensorRT's own cache whose scale the offline cache has, within 1 and 10 per cent."""
        ours, theirs = (parse_cache((self.args.onnx / f"{name}.cache").read_bytes())[2] for name in ("offline", "tensorrt"))
        ratios = {name: ours[name] / amax for name, amax in theirs.items() if name in ours and amax > 0}
        near = {limit: sum(abs(ratio - 1) <= limit for ratio in ratios.values()) for limit in (0.01, 0.1)}
        self.report["caches"] = {
            "tensorrt": len(theirs),
            "offline": len(ours),
            "both": len(ratios),
            "within_1_percent": near[0.01],
            "within_10_percent": near[0.1],
            "worst": sorted(ratios.items(), key=lambda item: -abs(item[1] - 1))[:20],
            "only_tensorrt": sorted(set(theirs) - set(ours))[:40],
            "only_offline": sorted(set(ours) - set(theirs))[:40],
        }
        self.save()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--onnx", required=True, type=Path, help="folder of fp32.onnx, int8-gemm.onnx, int8-full.onnx")
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--shapes", default="64", help="of all engines; a range of batches builds slowly and runs slower")
    parser.add_argument("--batch", default="64", help="batches to time, within the shapes")
    parser.add_argument("--engines", nargs="*", choices=list(ENGINES), default=list(ENGINES))
    parser.add_argument("--images", type=int, default=64, help="to calibrate on")
    parser.add_argument("--minutes", type=float, default=6.0, help="no build begins after this")
    parser.add_argument("--evaluate", type=int, default=0, help="evaluate about this many images only; 0: all")
    parser.add_argument("--commit", default="unknown")
    args = parser.parse_args()
    run = Run(args)
    background = run.in_background()
    for name in args.engines:
        if time.perf_counter() - run.start > 60 * args.minutes:
            print(f"no time left for {name}", flush=True)
            continue
        if name == "implicit-tensorrt":
            run.do("calibrate", run.calibration("tensorrt"))
        if name == "implicit-offline":
            background[0].wait()
        run.build(name)
    for process in background:
        process.wait()
    built = list(run.report["builds"])
    for name in built:
        run.evaluate(name)
    for name in REFERENCES:
        if Path(run.file(f"{name}.ort.json")).is_file():
            run.report["evaluations"][f"{name}.onnx"] = run.measured(f"{name}.ort.json")
    run.bench(built)
    if all(Path(run.file(f"{name}.cache")).is_file() for name in ("offline", "tensorrt")):
        run.compare_caches()
    run.save()
    for model, result in run.report["evaluations"].items():
        print(f"{model:<28} {result['acc1']:6.2f} {result['acc5']:6.2f} {result['images_per_second']:9.1f}")
    for row in run.report["rows"]:
        print(f"{row['model']:<26} {row['backend']:<28} {row['batch']:4d} {row['ms']:9.3f} {row['images_per_second']:9.1f}")
    print(json.dumps(run.report.get("caches"))[:3000])


if __name__ == "__main__":
    main()
