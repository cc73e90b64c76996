"""The device that a job runs on."""

import pytest
import torch

from qswin.qat.distributed import process_group


@pytest.mark.parametrize(("message", "words"), [("", "RuntimeError"), ("no memory\nat 0x1", "no memory")])
def test_a_device_that_cannot_be_used_is_one_line(monkeypatch, message, words):
    def zeros(*args, **kwargs):
        raise RuntimeError(message)

    monkeypatch.setattr(torch, "zeros", zeros)
    with pytest.raises(ValueError, match=f"^device=cpu: {words}; choose device=cpu$"), process_group("cpu"):
        pass
