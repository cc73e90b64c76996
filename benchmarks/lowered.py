"""A calibrated checkpoint on the project's kernels beside its fake-quantized model, on validation images.

    python -m benchmarks.lowered --checkpoint runs/x/ptq.safetensors ... --data DIR --out docs/results/lowered.json

On a GPU the kernels run; elsewhere their references in plain torch. Rows that are in the output file are kept.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.results import commit, device_name, write_rows
from qswin.calib.data.batches import image_batches
from qswin.calib.data.folders import scan_folder
from qswin.qat.checkpoint import load_checkpoint
from qswin.qat.lowering.lower import lower
from qswin.qat.ptq.prediction import LOGITS, divergence


@torch.inference_mode()
def logits(model: nn.Module, batches: list[Tensor], device: str) -> Tensor:
    """Of all images, (N, classes) float64 on the CPU."""
    return torch.cat([model(images.to(device)).double().cpu() for images in batches])


def measure(checkpoint: Path, data: Path, batch_size: int, workers: int, device: str) -> dict[str, Any]:
    """Accuracy of both, how often they agree, and the mean KL divergence between their predictions."""
    twin, description = load_checkpoint(checkpoint)
    twin = twin.to(device).eval()
    folder = scan_folder("classification", data / "val", description.classes)
    found = list(image_batches(folder.samples, description.preprocessing, batch_size, workers))
    images = [torch.from_numpy(batch.images) for batch in found]
    labels = torch.cat([torch.as_tensor(batch.labels) for batch in found])
    lowered = lower(twin, images[0][:1].to(device), torch.float16 if device == "cuda" else torch.float32)
    expected, ours = logits(twin, images, device), logits(lowered, images, device)
    kl = float(divergence({LOGITS: ours}, {LOGITS: expected}).mean())
    row: dict[str, Any] = {"model": description.model["name"], "images": len(labels), "kl": round(kl, 7)}
    for name, each in (("fake_quantized", expected), ("kernels", ours)):
        row[f"acc1_{name}"] = round(100 * float((each.argmax(1) == labels).double().mean()), 2)
    return row | {"agreement": round(100 * float((ours.argmax(1) == expected.argmax(1)).double().mean()), 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, type=Path, nargs="+")
    parser.add_argument("--data", required=True, type=Path, help="a folder with val/")
    parser.add_argument("--name", help="of the model in the rows, where it is not the architecture's")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--commit", default=commit())
    args = parser.parse_args()
    rows = json.loads(args.out.read_text()) if args.out.is_file() else []
    for checkpoint in args.checkpoint:
        row = measure(checkpoint, args.data, args.batch_size, args.workers, args.device)
        named = {"model": args.name or row["model"], "device": device_name(args.device), "commit": args.commit}
        rows.append(row | named)
        print(json.dumps(rows[-1]), flush=True)
        write_rows(args.out, rows)


if __name__ == "__main__":
    main()
