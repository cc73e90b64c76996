"""What the modules of a package offer under an agreed name."""

import importlib
import pkgutil
from collections.abc import Iterator
from types import ModuleType
from typing import Any


def offers(package: ModuleType, name: str) -> Iterator[Any]:
    """The attribute `name` of each module of a package that has it. The modules are imported, in alphabetical order."""
    for info in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        module = importlib.import_module(info.name)
        if hasattr(module, name):
            yield getattr(module, name)
