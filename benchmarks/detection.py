"""Faster R-CNN with a Swin backbone on ACDC's slices: float, PTQ, QAT and ONNX Runtime, by COCO's average precision.

The boxes are those around each structure of the heart. The backbone is Swin-Unet's encoder, which knows the slices.

python -m benchmarks.detection --npz FILE --checkpoint FILE --work runs/detection --out docs/results/detection.json
"""

import argparse
import contextlib
import dataclasses
import io
import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign, masks_to_boxes

from benchmarks.results import commit, device_name, write_rows
from qswin.calib.data.images import Preprocessing
from qswin.calib.trt_cache.session import Session
from qswin.models.backbones.pyramid import PyramidBackbone
from qswin.models.registry import build_model
from qswin.qat.checkpoint import Description
from qswin.qat.export.onnx_export import export_onnx, save_onnx
from qswin.qat.ptq.calibrate import calibrate
from qswin.qat.quant.quantizers import quantizers
from qswin.qat.quant.recipe import named_recipe
from qswin.qat.quant.rewrite import quantize, recipe_of

NAME = "swin_unet_tiny_patch4_window7_224"
STAGES = ["stage1", "stage2", "stage3", "stage4"]
STRUCTURES = ("right ventricle", "myocardium", "left ventricle")  # labels 1, 2 and 3
PREPROCESSING = Preprocessing(size=(224, 224), mean=(0.5,) * 3, std=(0.25,) * 3)
DIVISOR = 32
Target = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Slices:
    """Images (3, H, W) in [0, 1], and the boxes and labels of what is on each."""

    images: list[Tensor]
    targets: list[Target]

    @classmethod
    def of(cls, images: np.ndarray, masks: np.ndarray, size: int) -> "Slices":
        """Of grey images and masks, (N, H, W) uint8, made smaller by a whole factor so that `size` is a side."""
        step = images.shape[1] // size
        grey = functional.avg_pool2d(torch.from_numpy(images)[:, None].float() / 255, step)
        return cls(
            [each.expand(3, -1, -1) for each in grey],
            [boxes_of(mask) for mask in torch.from_numpy(masks)[:, ::step, ::step]],
        )


def boxes_of(mask: Tensor) -> Target:
    """The box around each structure on a mask, (H, W)."""
    labels = mask.unique()
    labels = labels[labels > 0].long()
    found = mask[None] == labels[:, None, None]
    boxes = masks_to_boxes(found) if len(labels) else torch.zeros(0, 4)
    boxes[:, 2:] += 1  # the far edge of the last pixel
    return {"boxes": boxes, "labels": labels}


def detector(backbone: nn.Module, size: int) -> FasterRCNN:
    """A Faster R-CNN whose heads read every map of a pyramid. Images keep their size.

    A slice holds three boxes at most, so fewer regions are looked at than in photos.
    """
    anchors = AnchorGenerator(tuple((side,) for side in (8, 16, 32, 64, 128)), ((0.5, 1.0, 2.0),) * 5)
    pooling = MultiScaleRoIAlign(STAGES, output_size=7, sampling_ratio=2)
    options = {"image_mean": PREPROCESSING.mean, "image_std": PREPROCESSING.std, "min_size": size, "max_size": size}
    options |= {"rpn_batch_size_per_image": 64, "box_batch_size_per_image": 64}
    options |= {"rpn_post_nms_top_n_train": 500, "rpn_post_nms_top_n_test": 200}
    return FasterRCNN(backbone, len(STRUCTURES) + 1, rpn_anchor_generator=anchors, box_roi_pool=pooling, **options)


def train(model: nn.Module, slices: Slices, epochs: int, lr: float, batch: int, device: str) -> None:
    """torchvision's reference loop: the sum of the detector's losses, by AdamW."""
    model.to(device).train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, epochs * -(-len(slices.images) // batch))
    for _ in range(epochs):
        for part in torch.randperm(len(slices.images)).split(batch):
            images = [slices.images[i].to(device) for i in part]
            targets = [{key: value.to(device) for key, value in slices.targets[i].items()} for i in part]
            losses = sum(model(images, targets).values())
            optimizer.zero_grad()
            losses.backward()
            optimizer.step()
            schedule.step()
    model.eval()


def write_annotations(slices: Slices, path: Path) -> None:
    """The boxes in COCO's format. An image's id is its place."""
    images, annotations = [], []
    for index, (image, target) in enumerate(zip(slices.images, slices.targets, strict=True)):
        size = {"width": image.shape[2], "height": image.shape[1]}
        images.append({"id": index, "file_name": f"{index}.png", **size})
        for box, label in zip(corner_and_size(target["boxes"]), target["labels"].tolist(), strict=True):
            what = {"category_id": label, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
            annotations.append({"id": len(annotations) + 1, "image_id": index, **what})
    categories = [{"id": index, "name": name} for index, name in enumerate(STRUCTURES, 1)]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))


def corner_and_size(boxes: Tensor) -> list[list[float]]:
    """[left, top, width, height] of each of (N, 4) corners."""
    return torch.cat((boxes[:, :2], boxes[:, 2:] - boxes[:, :2]), 1).tolist()


@torch.inference_mode()
def detections(model: nn.Module, slices: Slices, device: str) -> Iterator[dict[str, Any]]:
    """What the detector finds, in the form of COCO's results."""
    model.to(device).eval()
    for index, image in enumerate(slices.images):
        (found,) = model([image.to(device)])
        rows = zip(corner_and_size(found["boxes"]), found["labels"].tolist(), found["scores"].tolist(), strict=True)
        for box, label, score in rows:
            yield {"image_id": index, "category_id": label, "bbox": box, "score": score}


def average_precision(annotations: Path, found: Iterable[dict[str, Any]]) -> dict[str, float]:
    """COCO's AP over overlaps of 0.5 to 0.95, and at 0.5, in per cent."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):  # it prints its tables
        truth = COCO(str(annotations))
        evaluation = COCOeval(truth, truth.loadRes(list(found)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {"map": round(100 * float(evaluation.stats[0]), 2), "map50": round(100 * float(evaluation.stats[1]), 2)}


def normalized(slices: Slices, batch: int, device: str) -> Iterator[Tensor]:
    """(N, 3, H, W) as the backbone sees them in the detector."""
    mean, std = (torch.tensor(each)[:, None, None] for each in (PREPROCESSING.mean, PREPROCESSING.std))
    for at in range(0, len(slices.images), batch):
        yield torch.stack([(image - mean) / std for image in slices.images[at : at + batch]]).to(device)


class OnnxBackbone(nn.Module):
    """A backbone's graph in ONNX Runtime, in its place in the detector."""

    def __init__(self, path: Path, out_channels: int) -> None:
        super().__init__()
        self.graph = Session(path, path.read_bytes())
        self.names = [output.name for output in self.graph.session.get_outputs()]
        self.out_channels = out_channels

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        found = self.graph.run(self.names, x.cpu().numpy())
        return {name: torch.from_numpy(each).to(x.device) for name, each in zip(self.names, found, strict=True)}


class Job:
    """Trains the float detector, then measures each recipe after calibration and after QAT."""

    def __init__(self, args: argparse.Namespace, slices: dict[str, Slices]) -> None:
        self.args, self.slices, self.rows = args, slices, []
        self.annotations = args.work / "annotations.json"
        write_annotations(slices["val"], self.annotations)
        self.arguments = {"out_features": STAGES, **args.settings}
        torch.manual_seed(0)
        body = build_model(NAME, checkpoint=args.checkpoint, **self.arguments)
        self.model = detector(PyramidBackbone(body, args.channels), args.size)

    def measure(self, model: nn.Module, stage: str, recipe: str, backend: str = "torch") -> None:
        start = time.perf_counter()
        found = average_precision(self.annotations, detections(model, self.slices["val"], self.args.device))
        row = {"recipe": recipe, "stage": stage, "backend": backend, **found, "images": len(self.slices["val"].images)}
        self.rows.append({"model": f"Faster R-CNN, {NAME}'s encoder", **row, "device": device_name(self.args.device)})
        self.rows[-1] |= {"commit": commit(), "seconds": round(time.perf_counter() - start, 1)}
        print(f"{recipe:<14} {stage:<6} {backend:<12} mAP {found['map']:6.2f}  mAP50 {found['map50']:6.2f}", flush=True)
        write_rows(self.args.out, self.rows)

    def run(self) -> None:
        args = self.args
        self.train_float(args.work / "float.pth")
        self.measure(self.model, "float", "none")
        floating = self.model.backbone
        for name in args.recipes:
            self.model.backbone = quantize(floating, named_recipe(name)).to(args.device)
            calibrate(self.model.backbone, list(normalized(self.slices["train"], args.batch, args.device)))
            self.measure(self.model, "ptq", name)
            self.export(name)
            if args.qat_epochs:
                for quantizer in quantizers(self.model.backbone):
                    quantizer.learn_range()
                train(self.model, self.slices["train"], args.qat_epochs, args.lr / 10, args.batch, args.device)
                self.measure(self.model, "qat", name)

    def train_float(self, weights: Path) -> None:
        """Trains the float detector; or takes the weights that an earlier run left in the folder."""
        args = self.args
        if weights.is_file():
            self.model.load_state_dict(torch.load(weights, weights_only=True))
            return
        train(self.model, self.slices["train"], args.epochs, args.lr, args.batch, args.device)
        torch.save(self.model.state_dict(), weights)

    def export(self, name: str) -> None:
        """The backbone's graph, measured in the detector, where the graph's format is INT8."""
        backbone: Any = self.model.backbone
        padded = -(-self.args.size // DIVISOR) * DIVISOR  # which torchvision's detectors do to images
        size = (padded, padded)
        preprocessing = dataclasses.replace(PREPROCESSING, size=size)
        what = {"name": NAME, **self.arguments}
        description = Description(what, "ptq", preprocessing, recipe=recipe_of(backbone))
        path = self.args.work / f"{name}.onnx"
        save_onnx(path, export_onnx(backbone, description), description.to_dict())
        self.model.backbone = OnnxBackbone(path, self.args.channels)
        self.measure(self.model, "ptq", name, "onnxruntime")
        self.model.backbone = backbone


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--npz", required=True, type=Path)
    parser.add_argument("--checkpoint", required=True, type=Path, help="of Swin-Unet")
    parser.add_argument("--work", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--recipes", nargs="+", default=["gemm", "attention", "auto"])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--qat-epochs", type=int, default=4)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224, help="pixels of a side; a part of the file's")
    parser.add_argument("--channels", type=int, default=128, help="of the pyramid")
    parser.add_argument("--settings", type=json.loads, default={}, help="of the backbone, as JSON")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    with np.load(args.npz) as file:
        splits = ("train", "val")
        slices = {each: Slices.of(file[f"{each}_image"], file[f"{each}_label"], args.size) for each in splits}
    Job(args, slices).run()


if __name__ == "__main__":
    main()
