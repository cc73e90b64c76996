"""The images that the loops of this page train on: one folder a class, prepared as the model's images are."""

import torch
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2 as transforms

from qswin import Preprocessing


def photos(preprocessing: Preprocessing) -> Dataset:
    """(image, label) pairs: (3, H, W) float32 and a class index."""
    steps = [
        transforms.RandomResizedCrop(preprocessing.size, scale=(0.7, 1.0)),
        transforms.RandomHorizontalFlip(),
        transforms.ToImage(),
        transforms.ToDtype(torch.float32, scale=True),
        transforms.Normalize(preprocessing.mean, preprocessing.std),
    ]
    return ImageFolder("photos/train", transforms.Compose(steps))
