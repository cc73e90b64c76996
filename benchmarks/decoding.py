"""Images/s of training batches: Pillow in processes beside NVIDIA DALI, on photographs of ImageNet's size.

    pip install 'qswin[dali]'
    python -m benchmarks.decoding --out docs/results/decoding.json [--workers 2 16] [--batches 20]

The images are noise as JPEGs of 500x375 pixels, of about 90 kB each. The two decoders' pictures are compared first.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.results import commit, device_name, write_rows
from qswin.calib.data.folders import ImageFolder, scan_folder
from qswin.calib.data.images import Preprocessing
from qswin.qat.schema import AugmentConfig
from qswin.qat.training.dali import DrawPiece, EncodedImages
from qswin.qat.training.dali import load_batches as load_with_dali
from qswin.qat.training.images import ClassificationTransform, TrainBatch, TrainImages, load_batches

PREPROCESSING, AUGMENT = Preprocessing(), AugmentConfig()


def write_images(root: Path, count: int) -> ImageFolder:
    """Noise at three scales, which JPEG finds as hard to write as a photograph."""
    rng, folder = np.random.default_rng(0), root / "noise"
    folder.mkdir()
    for index in range(count):
        layers = [rng.normal(0, 40, (375 // scale, 500 // scale, 3)) for scale in (3, 12, 60)]
        resized = [Image.fromarray((128 + layer).clip(0, 255).astype(np.uint8)).resize((500, 375)) for layer in layers]
        pixels = sum(np.asarray(image, np.float32) - 128 for image in resized) + 128
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{index:03}.jpg", quality=90)
    return scan_folder("classification", root)


def load(decoder: str, folder: ImageFolder, batches: list[list[int]], workers: int) -> Iterator[TrainBatch]:
    if decoder == "pillow":
        return load_batches(
            TrainImages(folder, ClassificationTransform(PREPROCESSING, AUGMENT), 0, 0, False), batches, workers
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return load_with_dali(
        EncodedImages(folder, DrawPiece(AUGMENT), 0, 0, False), batches, PREPROCESSING, workers, device
    )


def rate(decoder: str, folder: ImageFolder, batches: list[list[int]], workers: int) -> float:
    """Images/s after the first batch, whose time is that of starting."""
    loaded = load(decoder, folder, batches, workers)
    next(loaded)
    start = time.perf_counter()
    images = sum(len(batch.images) for batch in loaded)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return images / (time.perf_counter() - start)


def difference(folder: ImageFolder, batch: list[int]) -> float:
    """Mean absolute difference of the two decoders' pixels, in levels of 255."""
    pillow, dali = (next(load(decoder, folder, [batch], 0)).images.cpu() for decoder in ("pillow", "dali"))
    return float(((pillow - dali).abs().mean((0, 2, 3)) * torch.tensor(PREPROCESSING.std)).mean() * 255)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--workers", nargs="*", type=int, default=[2])
    parser.add_argument("--batches", type=int, default=20)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--commit", default=commit())
    args = parser.parse_args()
    device = device_name("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as root:
        folder = write_images(Path(root), args.batch_size)
        size = sum(path.stat().st_size for path, _ in folder.samples) / len(folder.samples)
        batches = [list(range(args.batch_size))] * args.batches
        row = {"difference": round(difference(folder, batches[0]), 3), "bytes": round(size), "device": device}
        rows = []
        for workers in args.workers:
            for decoder in ("pillow", "dali"):
                found = round(rate(decoder, folder, batches, workers), 1)
                rows.append(
                    {"decoder": decoder, "workers": workers, "images_per_second": found, **row, "commit": args.commit}
                )
                print(rows[-1], flush=True)
    write_rows(args.out, rows)


if __name__ == "__main__":
    main()
