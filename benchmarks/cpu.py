"""What qswin costs on a CPU: evaluation beside a bare ONNX Runtime session, and the peak memory of calibration and QAT.

    python -m benchmarks.cpu --onnx FILE --data TINY_IMAGENET/val --out docs/results/cpu.json

Each step runs in a process of its own, whose peak resident memory is read at its end.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from benchmarks.results import commit, device_name
from qswin.calib.files import write_json

SWIN = """
import json, resource, torch
from qswin.models.registry import build_model
from qswin.qat.ptq.ranges import find_ranges
from qswin.qat.quant.recipe import named_recipe
from qswin.qat.quant.rewrite import quantize
torch.manual_seed(0)
model = build_model("swin_tiny_patch4_window7_224")
batches = [torch.randn(8, 3, 224, 224) for _ in range(4)]
twin = quantize(model, named_recipe("full"))
def step(model):
    optimizer = torch.optim.AdamW(model.train().parameters(), 1e-6)
    for batch in batches[:2]:
        torch.nn.functional.cross_entropy(model(batch), torch.arange(8)).backward()
        optimizer.step(); optimizer.zero_grad()
"""
STEPS = {
    "float forward": "with torch.inference_mode(): [twin(batch) for batch in batches]",
    "calibration": "find_ranges(twin, batches)",
    "float training step": "step(model)",
    "QAT step": "find_ranges(twin, batches[:1]); step(twin)",
}
PEAK = "\nprint(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))"
SESSION = """
import json, sys, time
import numpy as np, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
images = np.random.default_rng(0).standard_normal((32, 3, 224, 224), dtype=np.float32)
session.run(None, {"input": images})
start = time.perf_counter()
for _ in range(10): session.run(None, {"input": images})
print(json.dumps(320 / (time.perf_counter() - start)))
"""


def run(code: str, *arguments: str) -> float:
    """The number that a Python process prints last."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], text=True, capture_output=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def evaluation(args: argparse.Namespace) -> float:
    """images/s of `qswin evaluate`, decoding included."""
    report = args.out.with_suffix(".evaluate.json")
    command = ["qswin", "evaluate", "--model", str(args.onnx), "--data", str(args.data), "--images", "640"]
    subprocess.run([sys.executable, "-m", *command, "--json", str(report)], check=True, stdout=subprocess.DEVNULL)
    rate = json.loads(report.read_text())["images_per_second"]
    report.unlink()
    return rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--onnx", required=True, type=Path)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    args = parser.parse_args()
    before, ours, after = run(SESSION, str(args.onnx)), evaluation(args), run(SESSION, str(args.onnx))
    memory = {name: round(run(SWIN + step + PEAK) / 1e6) for name, step in STEPS.items()}
    rates = {"session": round(before, 2), "evaluate": round(ours, 2), "session again": round(after, 2)}
    report = {"images_per_second": rates, "peak_megabytes": memory, "device": device_name("cpu"), "commit": commit()}
    write_json(args.out, report)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
