"""Backbones: feature maps at any image size, for detectors and segmentors."""
