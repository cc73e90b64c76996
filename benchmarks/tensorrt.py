"""Swin-T on TensorRT: builds every precision, evaluates and times each engine, compares calibration caches.

    for r in gemm full: qswin calibrate --config configs/swin_tiny_tinyimagenet.yaml ... recipe=$r run=runs/$r
    qswin export --checkpoint runs/gemm/ptq.safetensors --precision fp32 --opset 17 --onnx DIR/fp32.onnx
    qswin export --checkpoint runs/gemm/ptq.safetensors --opset 17 --onnx DIR/int8-gemm.onnx   (and int8-full.onnx)
    python -m benchmarks.tensorrt --onnx DIR --data TINY_IMAGENET --out docs/results/tensorrt-8.6-h200.json

No torch.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.steps import Steps
from qswin.calib.files import write_json
from qswin.calib.trt_cache.cache_file import parse_cache

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
FAST = ("fp16", "int8-gemm", "int8-full")  # built for the further --shapes too
LAYERS = (
    "int8-full",
)  # whose layers are compared with ONNX Runtime's; 8.6 does not build fp16 with its layers as outputs


class Run:
    """The steps of one run, in the folder of the ONNX files; results gather in `report`."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.steps = args, Steps(args.gpus.split(","))
        self.report: dict[str, Any] = {"commit": args.commit, "builds": {}, "evaluations": {}, "errors": {}, "rows": []}

    def do(self, name: str, *command: str) -> bool:
        done = self.steps.run(name, *command)
        write_json(self.args.out, {**self.report, "failed": self.steps.failed})
        return done

    def file(self, name: str) -> str:
        return str(self.args.onnx / name)

    def json(self, name: str) -> Any:
        return json.loads((self.args.onnx / name).read_text())

    def measured(self, name: str) -> dict[str, float]:
        """The figures of a report, without the paths of the machine."""
        return {key: value for key, value in self.json(name).items() if isinstance(value, int | float)}

    def in_background(self) -> dict[str, subprocess.Popen[bytes]]:
        """What needs the CPU only: the offline cache, and Acc@1 in ONNX Runtime."""
        commands = (
            {"offline": self.calibration("offline", "--offline")} if "implicit-offline" in self.args.engines else {}
        )
        for name in sorted({ENGINES[engine][0] for engine in self.args.engines}):
            if not Path(self.file(f"{name}.ort.json")).is_file():  # of an earlier run in this folder
                arguments = ["--threads", "4", "--json", self.file(f"{name}.ort.json")]
                commands[name] = self.evaluation(f"{name}.onnx", *arguments)
        return {name: start_quietly(command) for name, command in commands.items()}

    def calibration(self, name: str, *arguments: str) -> list[str]:
        data = ["--data", str(self.args.data / "train"), "--images", str(self.args.images), "--batch-size", "16"]
        files = ["--onnx", self.file("fp32.onnx"), "--cache", self.file(f"{name}.cache")]
        return ["qswin", "calib-cache", *files, *data, *arguments]

    def evaluation(self, model: str, *arguments: str) -> list[str]:
        data = ["--model", self.file(model), "--data", str(self.args.data / "val"), "--workers", "16"]
        return ["qswin", "evaluate", *data, "--images", str(self.args.evaluate), *arguments]

    def build(self, name: str, shapes: str) -> None:
        onnx, precision, further = ENGINES[name]
        engine = f"{name}@{shapes}"
        files = ["--onnx", self.file(f"{onnx}.onnx"), "--engine", self.file(f"{engine}.engine")]
        options = [self.file(word) if word.endswith(".cache") else word for word in further]
        # A timing cache for each, for several builds go on at once.
        options += ["--precision", precision, "--batch-sizes", shapes, "--timing-cache", self.file(f"{engine}.timing")]
        if not self.do(f"build {engine}", "qswin", "build", *files, *options):
            return
        sidecar = self.json(f"{engine}.engine.json")
        kept = ("version", "gpu", "capability", "seconds", "warm_timing_cache", "overrides", "not_honoured")
        self.report["builds"][engine] = {key: sidecar[key] for key in kept}

    def build_all(self, background: dict[str, subprocess.Popen[bytes]]) -> list[str]:
        """Builds every engine that there is time for; returns the names of those that were built."""
        first, *others = self.args.shapes.split()
        jobs = [(name, first) for name in self.args.engines]
        jobs += [(name, shapes) for shapes in others for name in self.args.engines if name in FAST]

        def build(job: tuple[str, str]) -> None:
            name, _ = job
            if self.steps.elapsed() > 60 * self.args.minutes:
                print(f"no time left for {job}", flush=True)
                return
            if name == "implicit-tensorrt":
                self.do("calibrate", *self.calibration("tensorrt"))
            if name == "implicit-offline":
                background["offline"].wait()
            self.build(*job)

        self.steps.each(build, jobs)
        return [engine for name, shapes in jobs if (engine := f"{name}@{shapes}") in self.report["builds"]]

    def evaluate(self, engine: str) -> None:
        """Accuracy, and the errors against its own ONNX file in ONNX Runtime."""
        if self.do(
            f"evaluate {engine}", *self.evaluation(f"{engine}.engine", "--json", self.file(f"{engine}.eval.json"))
        ):
            self.report["evaluations"][f"{engine}.engine"] = self.measured(f"{engine}.eval.json")
        if self.compare(engine, "errors", "--images", "64"):
            self.report["errors"][engine] = self.measured(f"{engine}.errors.json")

    def compare_layers(self, engine: str) -> None:
        if self.compare(engine, "layers", "--layers", "--images", "16"):
            layers = self.json(f"{engine}.layers.json")
            self.report.setdefault("layers", {})[engine] = {key: layers[key] for key in ("layers", "parting")}

    def compare(self, engine: str, kind: str, *arguments: str) -> bool:
        name = engine.split("@")[0]
        files = ["--model", self.file(f"{engine}.engine"), "--reference", self.file(f"{ENGINES[name][0]}.onnx")]
        report = ["--data", str(self.args.data / "val"), "--json", self.file(f"{engine}.{kind}.json")]
        return self.do(f"compare {engine} {kind}", "qswin", "compare", *files, *report, *arguments)

    def bench(self, engines: list[str]) -> None:
        models = [self.file(f"{engine}.engine") for engine in engines]
        arguments = ["--batch-sizes", self.args.batch, "--cuda-graph", "--json", self.file("bench.json")]
        if self.do("bench", "qswin", "bench", "--model", *models, *arguments):
            accuracy = self.report["evaluations"]
            rows = self.json("bench.json")["rows"]
            self.report["rows"] = [{**row, "acc1": accuracy.get(row["model"], {}).get("acc1")} for row in rows]

    def compare_caches(self) -> None:
        """Shares of the tensors of TensorRT's own cache whose scale the offline cache has, within 1 and 10 per cent."""
        ours, theirs = (
            parse_cache((self.args.onnx / f"{name}.cache").read_bytes())[2] for name in ("offline", "tensorrt")
        )
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


def start_quietly(command: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--onnx", required=True, type=Path, help="folder of fp32.onnx, int8-gemm.onnx, int8-full.onnx")
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--gpus", default="0", help="to build and evaluate on, e.g. 0,1; the first one times")
    parser.add_argument("--shapes", default="64", help='of all engines; "64 1 256": the others of the fast ones only')
    parser.add_argument("--batch", default="1,16,64,256", help="batches to time, within the shapes")
    parser.add_argument("--engines", nargs="*", choices=list(ENGINES), default=list(ENGINES))
    parser.add_argument(
        "--layers", nargs="*", default=LAYERS, help="engines whose layers are compared, at the first shapes"
    )
    parser.add_argument("--images", type=int, default=64, help="to calibrate on")
    parser.add_argument("--minutes", type=float, default=6.0, help="no build begins after this")
    parser.add_argument("--evaluate", type=int, default=0, help="evaluate about this many images only; 0: all")
    parser.add_argument("--commit", default="unknown")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    run = Run(args)
    background = run.in_background()
    built = run.build_all(background)
    first = [engine for engine in built if engine.endswith(f"@{args.shapes.split()[0]}")]
    run.steps.each(run.evaluate, first)
    run.bench(built)
    layered = [engine for engine in first if engine.split("@")[0] in args.layers]
    run.steps.each(run.compare_layers, layered)
    for process in background.values():
        process.wait()
    for name in REFERENCES:
        if Path(run.file(f"{name}.ort.json")).is_file():
            run.report["evaluations"][f"{name}.onnx"] = run.measured(f"{name}.ort.json")
    if all(Path(run.file(f"{name}.cache")).is_file() for name in ("offline", "tensorrt")):
        run.compare_caches()
    write_json(args.out, {**run.report, "failed": run.steps.failed})
    for model, result in run.report["evaluations"].items():
        print(f"{model:<28} {result['acc1']:6.2f} {result['acc5']:6.2f} {result['images_per_second']:9.1f}")
    for row in run.report["rows"]:
        print(
            f"{row['model']:<26} {row['backend']:<28} {row['batch']:4d} {row['ms']:9.3f}"
            f" {row['images_per_second']:9.1f}"
        )
    print(json.dumps(run.report.get("caches"))[:3000])


if __name__ == "__main__":
    main()
