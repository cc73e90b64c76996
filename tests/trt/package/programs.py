"""The programs of a package: imported from where they lie, Triton's Python backend being stood in for."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace


def load(path: Path) -> ModuleType:
    """A program as a module; it imports what lies beside it."""
    sys.path.insert(0, str(path.parent))
    sys.modules.pop("preprocess", None)
    try:
        spec = importlib.util.spec_from_file_location(f"packaged_{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(path.parent))
        sys.modules.pop("preprocess", None)


class Tensor:
    """triton_python_backend_utils.Tensor, as much of it as is used."""

    def __init__(self, name, values):
        self.name, self.values = name, values

    def as_numpy(self):
        return self.values


def load_step(folder: Path, monkeypatch):
    """model.py of a model repository's folder, initialized as the server does; a function of its requests."""
    utils = ModuleType("triton_python_backend_utils")
    utils.Tensor, utils.TritonError = Tensor, str
    utils.InferenceResponse = lambda output_tensors, error=None: SimpleNamespace(tensors=output_tensors, error=error)
    utils.get_input_tensor_by_name = lambda request, name: next(each for each in request if each.name == name)
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", utils)
    model = load(folder / "1" / "model.py").TritonPythonModel()
    model.initialize({"model_repository": str(folder), "model_version": "1"})
    return model.execute
