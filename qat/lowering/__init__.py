"""Modules of an INT8 model: they hold integer weights and scales, and call the kernels."""
