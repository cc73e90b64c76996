"""A checkpoint that comes from elsewhere."""

from pathlib import Path

import pytest
import torch

from tests.models.checkpoints.test_logits import torchvision_swin


@pytest.fixture
def swin_file(tmp_path) -> Path:
    """A small Swin of torchvision, for 5 classes."""
    torch.save(torchvision_swin(False).state_dict(), tmp_path / "mine.pth")
    return tmp_path / "mine.pth"
