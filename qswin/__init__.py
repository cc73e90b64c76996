"""qswin: quantization-aware training and calibration for Swin-family vision transformers.

The names below are the public face; each is imported when it is first used, so that `import qswin` needs no torch.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qswin.calib.data.images import Preprocessing
    from qswin.models.registry import build_model
    from qswin.qat.checkpoint import Description, load_checkpoint, save_checkpoint
    from qswin.qat.export.onnx_export import export_onnx, save_onnx
    from qswin.qat.ptq.calibrate import calibrate
    from qswin.qat.quant.recipe import Recipe, Rule, named_recipe
    from qswin.qat.quant.rewrite import disable, enable, quantize

# ONNX Runtime 1.32 tells Microsoft what it runs, unless this is set before it is imported. Its own
# disable_telemetry_events() comes too late.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

_HOMES = {
    "qswin.calib.data.images": ("Preprocessing",),
    "qswin.models.registry": ("build_model",),
    "qswin.qat.checkpoint": ("Description", "load_checkpoint", "save_checkpoint"),
    "qswin.qat.export.onnx_export": ("export_onnx", "save_onnx"),
    "qswin.qat.ptq.calibrate": ("calibrate",),
    "qswin.qat.quant.recipe": ("Recipe", "Rule", "named_recipe"),
    "qswin.qat.quant.rewrite": ("disable", "enable", "quantize"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "Description",
    "Preprocessing",
    "Recipe",
    "Rule",
    "build_model",
    "calibrate",
    "disable",
    "enable",
    "export_onnx",
    "load_checkpoint",
    "named_recipe",
    "quantize",
    "save_checkpoint",
    "save_onnx",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'qswin' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME_OF})
