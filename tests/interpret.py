"""Without a GPU, kernels run in Triton's interpreter. A plugin of pytest, for Triton reads this when it is imported."""

import os

import torch.library

if not torch.cuda.is_available() and os.environ.setdefault("TRITON_INTERPRET", "1") == "1":
    torch.library.wrap_triton = lambda kernel: kernel  # torch 2.11's own refuses kernels that are interpreted
