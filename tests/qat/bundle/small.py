"""Small bundles, whose code is no code: the tests of cubins.py compile some."""

import functools
from typing import NamedTuple

import pytest
import torch
from torch import nn

pytest.importorskip("triton", reason="Triton is not installed")

from qswin.qat.bundle.build import bundle_without_code  # noqa: E402
from qswin.qat.bundle.contents import Bundle, Cubin  # noqa: E402
from qswin.qat.lowering.lower import lower  # noqa: E402
from tests.helpers import V1, twin_of  # noqa: E402

MODEL = {"engine_precision": "int8", "preprocessing": {"size": [32, 32]}, "task": "classification", "classes": None}


class Made(NamedTuple):
    bundle: Bundle
    lowered: nn.Module
    images: torch.Tensor


def no_code(index: int, signature: str) -> Cubin:
    """The head of an ELF file, and the signature behind it, as the driver of cpp/tests/fake_cuda.cpp reads it."""
    head = b"\x7fELF\x02\x01" + bytes(58)
    return Cubin(head + signature.encode() + bytes(1 + index), f"kernel{index}", 16 * index, 32 * (1 + index % 4))


@functools.cache
def make_bundle(name: str = V1, recipe: str = "attention", **settings: int) -> Made:
    """A bundle of a small random Swin for batches of 1 and 4, and the model that it was made of."""
    side = settings.get("img_size", 32)
    images = torch.randn(6, 3, side, side, generator=torch.Generator().manual_seed(0))
    lowered = lower(twin_of(images, recipe, name=name, **settings), images[:1], torch.float16)
    bundle, _ = bundle_without_code(lowered, (side, side), (1, 4), MODEL)
    cubins = tuple(no_code(*each) for each in enumerate(bundle.signatures))
    return Made(bundle._replace(code={80: cubins, 90: cubins}), lowered, images)
