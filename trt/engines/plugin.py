"""The library of our plugin for TensorRT, cpp/tensorrt: whether it is the right one, and known to TensorRT.

It is code: load only one you built yourself.
"""

import ctypes
from pathlib import Path
from typing import Any

from qswin.trt.engines.version import TensorRT, find_tensorrt, tensorrt_module

NAME = "QswinBundle"  # of the plugin, as cpp/tensorrt/plugin.h has it
LIBRARY = "libqswin_trt.so"


def find_creator() -> Any | None:
    """TensorRT's IPluginCreator of the plugin, or None where no library with it was loaded."""
    registry = tensorrt_module().get_plugin_registry()
    creators = registry.all_creators if hasattr(registry, "all_creators") else registry.plugin_creator_list
    return next((creator for creator in creators if creator.name == NAME), None)


def load_plugin(library: Path) -> TensorRT:
    """Makes the plugin known to TensorRT, for the whole process; a second time nothing is done.

    Returns:
        The TensorRT that has it.

    Raises:
        FileNotFoundError: there is no such library.
        ValueError: TensorRT is not installed or too old, or the library is not the plugin's or for another TensorRT.
    """
    tensorrt = find_tensorrt("tensorrt")
    if not library.is_file():
        raise FileNotFoundError(f"{library}: no such library")
    registry = tensorrt_module().get_plugin_registry()
    if not hasattr(registry, "load_library"):
        raise ValueError(f"{tensorrt} loads no libraries of plugins; 8.6 and newer do")
    check_library(library, tensorrt)
    if find_creator() is None and registry.load_library(str(library.resolve())) is None:
        raise ValueError(f"{library}: {tensorrt} does not take it; build it with the headers of {tensorrt.version}")
    return tensorrt


def check_library(library: Path, tensorrt: TensorRT) -> None:
    """Raises ValueError unless a library is the plugin's, compiled for this TensorRT: another one would crash."""
    try:
        compiled = ctypes.CDLL(str(library.resolve())).qswin_tensorrt_version()
    except (OSError, AttributeError) as error:
        raise ValueError(f"{library}: is not {LIBRARY} of cpp/, or cannot be loaded ({error})") from error
    major = int(tensorrt.version.split(".")[0])
    if compiled // 100 != major:
        made_for = f"{compiled // 100}.{compiled % 100}"
        raise ValueError(
            f"{library}: compiled for TensorRT {made_for}, here is {tensorrt.version}; build it with headers of {major}"
        )


def check_loaded(path: Path) -> None:
    """Raises ValueError where the plugin of an engine is not known to TensorRT, before TensorRT's own error does."""
    if find_creator() is None:
        raise ValueError(f"{path}: its layers are in {LIBRARY}, which is not loaded; give --plugin {LIBRARY}")
