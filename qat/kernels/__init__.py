"""Triton kernels of an INT8 Swin, as operators of torch.library; on a CPU each runs as its reference in plain torch."""
