"""Without a GPU, kernels run in Triton's interpreter. A plugin of pytest, for Triton reads this when it is imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
