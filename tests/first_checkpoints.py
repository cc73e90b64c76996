"""Five checkpoints as five libraries write them, of small Swins with random weights, and some photos.

python -m tests.first_checkpoints DIR
"""

import argparse
import sys
import types
from pathlib import Path

import numpy as np
import timm
import timm.utils
import torch
import transformers
from PIL import Image
from torch import nn
from torchvision.models.swin_transformer import SwinTransformer

from tests.helpers import V1
from tests.models.checkpoints.openmmlab import OpenMMLabSwin
from tests.models.checkpoints.test_logits import lively, old_timm, save_pretrained

CLASSES, PHOTOS = 5, 48
SHAPE = {
    "embed_dim": 24,
    "depths": [2, 2],
    "num_heads": [2, 4],
}  # else as Swin-T: 224 pixels, patches of 4, windows of 7


def timms() -> nn.Module:
    return lively(timm.create_model(V1, num_classes=CLASSES, **SHAPE))


def by_timms_script(folder: Path) -> None:
    """As its train.py does: the arguments of the command line lie beside the weights."""
    model = timms()
    args = argparse.Namespace(model=V1, lr=1e-3, output=Path("out"))
    saver = timm.utils.CheckpointSaver(
        model, torch.optim.SGD(model.parameters(), 0.1), args, checkpoint_dir=str(folder)
    )
    saver.save_checkpoint(1, metric=np.float64(50))
    (folder / "last.pth.tar").rename(folder / "timm.pth")
    for other in folder.glob("*.tar"):
        other.unlink()


def by_torchvision(folder: Path) -> None:
    model = lively(SwinTransformer(patch_size=[4, 4], window_size=[7, 7], num_classes=CLASSES, **SHAPE))
    torch.save(model.state_dict(), folder / "torchvision.pth")


def by_hugging_face(folder: Path) -> None:
    save_pretrained("Swin", folder / "hugging_face", image_size=224, patch_size=4, window_size=7, **SHAPE)
    transformers.ViTImageProcessor(size={"height": 224, "width": 224}).save_pretrained(folder / "hugging_face")


def by_the_original_repository(folder: Path) -> None:
    """A config of yacs lies beside the weights: a subclass of dict."""
    yacs = types.ModuleType("yacs.config")
    yacs.CfgNode = type("CfgNode", (dict,), {"__module__": "yacs.config"})
    sys.modules |= {"yacs": types.ModuleType("yacs"), "yacs.config": yacs}
    torch.save({"model": old_timm(timms()), "epoch": 299, "config": yacs.CfgNode(AMP=True)}, folder / "original.pth")


def by_mmpretrain(folder: Path) -> None:
    model = OpenMMLabSwin(SHAPE["embed_dim"], SHAPE["depths"], SHAPE["num_heads"], 7, CLASSES)
    model.backbone.patch_embed.projection = nn.Conv2d(3, SHAPE["embed_dim"], 4, 4)
    state = {"meta": {"epoch": 300, "mmpretrain_version": "1.2.0"}, "state_dict": lively(model).state_dict()}
    torch.save(state, folder / "mmpretrain.pth")


def write_photos(folder: Path) -> None:
    """Smooth noise in many sizes, flat, without labels."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(PHOTOS):
        rough = Image.fromarray(rng.integers(0, 256, (6, 8, 3)).astype(np.uint8))
        rough.resize((240 + 4 * index, 320 - 2 * index), Image.Resampling.BICUBIC).save(folder / f"{index:02}.jpg")


def main(folder: Path) -> None:
    torch.manual_seed(0)
    (weights := folder / "weights").mkdir(parents=True)
    for write in (by_timms_script, by_torchvision, by_hugging_face, by_the_original_repository, by_mmpretrain):
        write(weights)
    write_photos(folder / "photos")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
