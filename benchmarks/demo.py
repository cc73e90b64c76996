"""`make demo`: the whole job on handwritten digits, offline, on a CPU.

A small Swin is trained in float, calibrated, fine-tuned with quantization, exported, evaluated in torch and in ONNX
Runtime and, where TensorRT-RTX is installed, built into an engine. Every step is the command a user would type.
"""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

ROOT = Path(__file__).resolve().parents[1]
RUN = ROOT / "runs" / "demo"
CONFIG = ROOT / "configs" / "swin_digits.yaml"


def write_digits(folder: Path) -> None:
    """scikit-learn's 1,797 digits of 8x8 pixels as an ImageFolder of 32x32 PNGs: 3/4 train, 1/4 val."""
    digits = load_digits()
    train, val = train_test_split(range(len(digits.target)), test_size=0.25, stratify=digits.target, random_state=0)
    for split, indices in (("train", train), ("val", val)):
        for index in indices:
            file = folder / split / str(digits.target[index]) / f"{index}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            pixels = (digits.images[index] * 255 / 16).astype("uint8")
            Image.fromarray(pixels).resize((32, 32), Image.Resampling.BICUBIC).save(file)


def qswin(command: str, *arguments: str) -> None:
    """Runs a command of qswin's as a user does, and stops the demo if it fails."""
    print(f"$ qswin {command} {' '.join(arguments)}", flush=True)
    subprocess.run([sys.executable, "-m", "qswin", command, *arguments], cwd=ROOT, check=True)


def evaluate(name: str, model: Path, data: Path) -> dict[str, float]:
    """One row of the table, from `qswin evaluate --json`."""
    result = RUN / f"{name}.metrics.json"
    qswin("evaluate", "--model", str(model), "--data", str(data / "val"), "--json", str(result))
    values = json.loads(result.read_text())
    megabytes = model.stat().st_size / 1e6
    return {
        "acc1": values["acc1"],
        "acc5": values["acc5"],
        "ms": 1e3 / values["images_per_second"],
        "megabytes": megabytes,
    }


def main() -> None:
    start = time.perf_counter()
    shutil.rmtree(RUN, ignore_errors=True)
    data = RUN / "digits"
    write_digits(data)
    common = ("--config", str(CONFIG), f"data.root={data}", f"run={RUN}")
    qswin("train", *common, "recipe=none", f"run={RUN / 'float'}")
    weights = RUN / "float" / "float.safetensors"
    qswin("calibrate", *common, f"model.checkpoint={weights}")
    qat = ("train.epochs=3", "train.lr=1e-4", "train.distill_weight=0.5", "train.warmup_steps=10")
    qswin("train", *common, *qat, f"model.checkpoint={weights}", f"init={RUN / 'ptq.safetensors'}")
    checkpoint = RUN / "qat.safetensors"
    for precision in ("fp32", "int8"):
        arguments = (
            "--checkpoint",
            str(checkpoint),
            "--onnx",
            str(RUN / f"{precision}.onnx"),
            "--precision",
            precision,
        )
        qswin("export", *arguments)
    models = {
        "float": weights,
        "ptq": RUN / "ptq.safetensors",
        "qat": checkpoint,
        "onnx_fp32": RUN / "fp32.onnx",
        "onnx_int8": RUN / "int8.onnx",
    }
    rows = {name: evaluate(name, model, data) for name, model in models.items()}
    try:
        import tensorrt_rtx_bindings  # noqa: F401

        qswin(
            "build", "--onnx", str(RUN / "int8.onnx"), "--engine", str(RUN / "int8.engine"), "--target", "tensorrt-rtx"
        )
        engine = f"{(RUN / 'int8.engine').stat().st_size / 1e6:.2f} MB, built for SM89; it runs on an RTX GPU"
    except ImportError:
        engine = "not built: pip install tensorrt-rtx-cu13-libs tensorrt-rtx-cu13-bindings"
    summary = {name: {"acc1": row["acc1"], "acc5": row["acc5"]} for name, row in rows.items()}
    (RUN / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(f"\n{'model':<12} {'MB':>7} {'Acc@1':>7} {'Acc@5':>7} {'ms/image':>9}")
    for name, row in rows.items():
        print(f"{name:<12} {row['megabytes']:7.2f} {row['acc1']:7.2f} {row['acc5']:7.2f} {row['ms']:9.2f}")
    print(f"TensorRT-RTX engine: {engine}")
    print(f"{time.perf_counter() - start:.0f} s; {RUN / 'summary.json'}")


if __name__ == "__main__":
    main()
