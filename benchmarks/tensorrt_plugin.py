"""An engine with our plugin beside TensorRT's own and beside the runner: speed, logits, Acc@1, size, time to load.

    qswin build --target bundle --checkpoint ... --engine DIR/int8.qsb --batch-sizes 1,64,256          (with torch)
    qswin export --checkpoint ... --opset 17 --onnx DIR/fp32.onnx --precision fp32; the same, DIR/int8.onnx
    QSWIN_LIBRARY=cpp/build/libqswin.so python -m benchmarks.tensorrt_plugin --bundle DIR/int8.qsb \\
        --plugin cpp/build/libqswin_trt.so --onnx DIR --data TINY_IMAGENET --out docs/results/tensorrt-plugin.json

FP16 and INT8 engines, one for each batch, go to --work; those that are there are not built again. No torch.
"""

import argparse
import ctypes
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.steps import Steps
from qswin.calib.data.images import noise_images
from qswin.calib.files import versions, write_json
from qswin.qat.backends.bundle import RunningBundle
from qswin.qat.bundle.runner import library
from qswin.trt.engines.cuda import captured, find_gpu
from qswin.trt.engines.engine import Engine
from qswin.trt.engines.plugin import load_plugin
from qswin.trt.engines.version import find_tensorrt, tensorrt_module
from qswin.trt.evaluation.timing import CUDA_GRAPH

THEIRS = {"fp16": "fp32", "int8": "int8"}  # {precision of TensorRT's own engine: the ONNX file that it is built from}
PLUGIN = "plugin.engine"


class Run:
    """The steps of one run; results gather in `report`, which is written after each."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.steps = args, Steps(["0"])
        self.report: dict[str, Any] = {"commit": args.commit, "versions": versions(), "rows": []}

    def write(self) -> None:
        write_json(self.args.out, {**self.report, "failed": self.steps.failed})

    def file(self, name: str) -> Path:
        return self.args.work / name

    def qswin(self, step: str, *arguments: str | Path) -> bool:
        done = self.steps.run(step, "qswin", *arguments)
        self.write()
        return done

    def build(self) -> list[str]:
        """Builds what is missing; returns the names of the engines that there are, the plugin's first."""
        batches = ",".join(map(str, (self.args.batch[0], self.args.batch[-1], self.args.batch[-1])))
        source = ("--bundle", self.args.bundle, "--plugin", self.args.plugin)
        options = ("--engine", self.file(PLUGIN), "--batch-sizes", batches)
        engines = [PLUGIN] if self.qswin("build plugin", "build", *source, *options) else []
        for batch in self.args.batch if self.args.onnx else ():
            engines += [name for precision in self.args.theirs if (name := self.build_theirs(precision, batch))]
        return engines

    def build_theirs(self, precision: str, batch: int) -> str | None:
        """TensorRT's own engine for a batch; None where there is none, and no time or no way to build it."""
        name = f"{precision}@{batch}.engine"
        if self.file(name).is_file():
            return name
        if self.steps.elapsed() > 60 * self.args.minutes:
            print(f"no time left for {name}", flush=True)
            return None
        source = ("--onnx", self.args.onnx / f"{THEIRS[precision]}.onnx", "--precision", precision)
        options = ("--engine", self.file(name), "--batch-sizes", str(batch))
        return name if self.qswin(f"build {name}", "build", *source, *options) else None

    def check(self) -> None:
        """Logits, loading and contexts of the plugin's engine, in this process."""
        load_plugin(self.args.plugin)
        gpu = find_gpu()
        self.report["gpu"] = None if gpu is None else gpu.name
        self.report["loading"] = {
            path.name: loading(path)
            for path in (self.file(PLUGIN), self.file(f"fp16@{self.args.batch[-1]}.engine"))
            if path.is_file()
        }
        engine, runner = Engine(self.file(PLUGIN)), RunningBundle(self.args.bundle)
        self.report["logits"] = {str(batch): logits(engine, runner, batch) for batch in self.args.batch}
        self.report["second_context"] = second_context(engine, self.args.batch[-1])
        self.write()

    def bench(self, engines: list[str]) -> None:
        models = [self.args.bundle, *(self.file(name) for name in engines)]
        sizes, result = ",".join(map(str, self.args.batch)), self.file("bench.json")
        options = ("--cuda-graph", "--batch-sizes", sizes, "--repeats", str(self.args.repeats), "--json", result)
        if self.qswin("bench", "bench", "--plugin", self.args.plugin, "--model", *models, *options):
            self.report["rows"] = json.loads(result.read_text())["rows"]
            self.report["speed_ups"] = speed_ups(self.report["rows"])

    def evaluate(self) -> None:
        """Acc@1 of the plugin's engine, of the runner and of TensorRT's FP16."""
        models = [self.file(PLUGIN), self.args.bundle, self.file(f"fp16@{self.args.batch[-1]}.engine")]
        for model in filter(Path.is_file, models):
            result = self.file(f"{model.name}.eval.json")
            data = ("--data", self.args.data / "val", "--workers", "16", "--json", result)
            if self.qswin(f"evaluate {model.name}", "evaluate", "--plugin", self.args.plugin, "--model", model, *data):
                values = json.loads(result.read_text())
                kept = {key: values[key] for key in ("acc1", "acc5", "images", "images_per_second")}
                self.report.setdefault("evaluations", {})[model.name] = kept


def loading(path: Path) -> dict[str, float]:
    """Bytes of an engine's file, and seconds to deserialize it and to make a context, the CUDA runtime being up."""
    trt, data = tensorrt_module(), path.read_bytes()
    runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
    start = time.perf_counter()
    engine = runtime.deserialize_cuda_engine(data)
    deserialized = time.perf_counter()
    context = engine.create_execution_context()
    made = time.perf_counter()
    assert context is not None
    seconds = {"deserialize_s": deserialized - start, "context_s": made - deserialized}
    return {"bytes": len(data), **{name: round(value, 4) for name, value in seconds.items()}}


def logits(engine: Engine, runner: RunningBundle, batch: int) -> dict[str, float]:
    """The largest difference of the engine's logits from the runner's on noise, run by itself and as a CUDA graph."""
    images = noise_images(batch, engine.preprocessing)
    largest = np.abs(runner.run(images)).max()
    difference = np.abs(engine(images) - runner.run(images)).max()
    with captured(engine.enqueue, engine.stream) as launch:
        engine.load(images / 2)
        launch()
        in_graph = np.abs(read_logits(engine) - runner.run(images / 2)).max()
    return {"max_logit": float(largest), "max_abs": float(difference), "graph_max_abs": float(in_graph)}


def read_logits(engine: Engine) -> np.ndarray:
    """What an engine's last inference left."""
    buffer = engine._buffers["logits"]
    values = np.empty(buffer.shape, dtype=np.float32)
    buffer.copy_to(values, engine._stream)
    engine._stream.synchronize()
    return values


def second_context(engine: Engine, batch: int) -> dict[str, Any]:
    """Whether a second execution context computes the same at the same time, and the GPU memory that it takes.

    Two contexts that run at once, ten times each, on streams of their own.
    """
    from polygraphy.cuda import DeviceArray, Stream

    images = noise_images(batch, engine.preprocessing)
    expected, free = engine(images), free_memory()
    context, stream = engine.engine.create_execution_context(), Stream()
    taken = free - free_memory()
    assert context.set_optimization_profile_async(0, stream.ptr)
    context.set_input_shape("input", images.shape)
    arrays = {"input": DeviceArray(images.shape, np.float32), "logits": DeviceArray(expected.shape, np.float32)}
    for name, array in arrays.items():
        context.set_tensor_address(name, array.ptr)
    arrays["input"].copy_from(np.ascontiguousarray(images), stream)
    for _ in range(10):
        engine.enqueue()
        assert context.execute_async_v3(stream.ptr)
    second = np.empty(expected.shape, dtype=np.float32)
    arrays["logits"].copy_to(second, stream)
    stream.synchronize()
    same = bool(np.array_equal(second, expected) and np.array_equal(read_logits(engine), expected))
    return {"same_logits": same, "bytes": taken}


def free_memory() -> int:
    """Bytes of GPU memory that are free."""
    from polygraphy.cuda import wrapper

    free, total = ctypes.c_size_t(0), ctypes.c_size_t(0)
    wrapper().check(wrapper().handle.cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total)))
    return free.value


def speed_ups(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """{batch: {"fp16": the plugin's images/s over those of TensorRT's FP16 engine, ...}}, all as CUDA graphs."""
    graphs = [row for row in rows if row["backend"].endswith(CUDA_GRAPH)]
    found: dict[str, dict[str, float]] = {}
    for ours in (row for row in graphs if row["model"] == PLUGIN):
        for row in graphs:
            if row["batch"] == ours["batch"] and row is not ours:
                name = row["model"].split("@")[0]
                found.setdefault(str(row["batch"]), {})[name] = round(row["ms"] / ours["ms"], 3)
    return found


def show(report: dict[str, Any]) -> None:
    for row in report["rows"]:
        name, backend, batch = row["model"], row["backend"], row["batch"]
        print(f"{name:<20} {backend:<34} {batch:5d} {row['ms']:9.4f} ms {row['images_per_second']:10.1f} images/s")
    for what in ("speed_ups", "logits", "second_context", "loading", "evaluations"):
        if what in report:
            print(what, json.dumps(report[what]))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", required=True, type=Path, help="that holds every --batch")
    parser.add_argument("--plugin", required=True, type=Path, help="libqswin_trt.so, for the TensorRT that is here")
    parser.add_argument("--onnx", type=Path, help="folder of fp32.onnx and int8.onnx, of the same model")
    parser.add_argument(
        "--theirs", nargs="*", choices=list(THEIRS), default=list(THEIRS), help="TensorRT's own engines"
    )
    parser.add_argument("--data", type=Path, help="to evaluate on: a folder with val/")
    parser.add_argument("--work", type=Path, default=Path("runs/tensorrt-plugin"), help="folder of the engines")
    parser.add_argument("--batch", nargs="*", type=int, default=[1, 64, 256], help="in ascending order")
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--minutes", type=float, default=6.0, help="no engine's build begins after this")
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--out", required=True, type=Path)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    for file in (args.bundle, args.plugin):
        if not file.is_file():
            raise SystemExit(f"{file}: no such file")
    args.work.mkdir(parents=True, exist_ok=True)
    find_tensorrt("tensorrt")
    library()  # of the runner, or an error that says how to build it
    run = Run(args)
    engines = run.build()
    run.bench(engines)
    if args.data:
        run.evaluate()
    if PLUGIN in engines:
        run.check()
    show(run.report)


if __name__ == "__main__":
    main()
