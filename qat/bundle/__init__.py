"""Bundles (.qsb): our kernels as cubins, weights as levels and lists of launches, in one file that needs no torch."""
