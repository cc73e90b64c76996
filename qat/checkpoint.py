"""Checkpoints: a .safetensors file of tensors and a .json sidecar that says what they are."""

import dataclasses
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import nn

from qswin.calib.data.images import Preprocessing
from qswin.calib.files import (
    check_suffix,
    read_json,
    read_sidecar,
    sha256,
    sidecar_path,
    write_result,
    write_with_sidecar,
)
from qswin.models.registry import build_model, check_state, family_of, read_state
from qswin.qat.config import load_config
from qswin.qat.float_model import build_float_model, model_arguments
from qswin.qat.quant.quantizers import quantizers
from qswin.qat.quant.recipe import Recipe
from qswin.qat.quant.rewrite import enable, quantize

KIND = "checkpoint"
SUFFIX = ".safetensors"


@dataclasses.dataclass(frozen=True)
class Description:
    """What a checkpoint is, apart from its tensors: the sidecar.

    `model` is build_model's arguments, `stage` float, ptq or qat, `recipe` None for a float model, `parent` the SHA-256 of
    the checkpoint this one was made from, `metrics` what was measured when it was saved.
    """

    model: dict[str, Any]
    stage: str
    preprocessing: Preprocessing
    classes: tuple[str, ...] | None = None
    recipe: Recipe | None = None
    parent: str | None = None
    metrics: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def task(self) -> str:
        """classification or segmentation."""
        return family_of(self.model["name"]).TASK

    def to_dict(self) -> dict[str, Any]:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        recipe = None if self.recipe is None else self.recipe.to_dict()
        return {**values, "task": self.task, "preprocessing": self.preprocessing.to_dict(), "recipe": recipe}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Description":
        values = {field.name: values[field.name] for field in dataclasses.fields(cls)}
        return cls(
            **values
            | {
                "preprocessing": Preprocessing(**values["preprocessing"]),
                "classes": None if values["classes"] is None else tuple(values["classes"]),
                "recipe": None if values["recipe"] is None else Recipe.from_dict(values["recipe"]),
            }
        )


def save_checkpoint(path: str | Path, model: nn.Module, description: Description) -> None:
    """Writes a model and its sidecar, each atomically; the sidecar, with the checksum of the tensors, last.

    Args:
        path: the name ends in .safetensors.

    Raises:
        ValueError: a quantizer was never calibrated or its range is dead; or the name ends otherwise.
        OSError: nothing could be written.
    """
    path = Path(path)
    check_suffix("checkpoint", path, (SUFFIX,))
    for quantizer in quantizers(model):
        quantizer.check_range()
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    write_with_sidecar(path, safetensors.torch.save(tensors), KIND, description.to_dict())


def write_report(report: Path | None, path: Path) -> None:
    """What `--json` of the commands that make a checkpoint writes: its name, and all that its sidecar says."""
    if report is not None:
        values = {key: value for key, value in read_json(sidecar_path(path)).items() if key != "kind"}
        write_result(report, "checkpoint report", {"checkpoint": str(path), **values})


def read_description(path: Path) -> Description:
    """The sidecar of a checkpoint.

    Raises:
        FileNotFoundError: the checkpoint or its sidecar is not there.
        ValueError: the sidecar is malformed, or it is another file's.
    """
    keys = [field.name for field in dataclasses.fields(Description)]
    values = read_sidecar(path, KIND, keys, "save or copy both again; for bare weights give their --config")
    try:
        return Description.from_dict(values)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path}: its sidecar does not describe a checkpoint ({error}); save it again") from error


def load_checkpoint(path: str | Path) -> tuple[nn.Module, Description]:
    """A model that was saved by `save_checkpoint`, ready to use: in evaluation mode, its quantizers quantizing.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the file is truncated, foreign or does not fit its sidecar.
    """
    path = Path(path)
    description = read_description(path)
    model = build_model(**description.model)
    if description.recipe is not None:
        model = quantize(model, description.recipe)
    state = read_state(path)
    check_state(state, model.state_dict(), path)
    model.load_state_dict(state)
    enable(model)
    return model.eval(), description


def load_model(path: Path, config_file: str | None, overrides: list[str]) -> tuple[nn.Module, Description]:
    """A checkpoint, or, with a config file that describes them, bare float weights.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the file is no checkpoint, or is not what its sidecar or the config says.
    """
    if config_file is None:
        return load_checkpoint(path)
    config = load_config(config_file, ["data.root=unused", "run=unused", *overrides, f"model.checkpoint={path}"])
    model, preprocessing = build_float_model(config.model, config.data.preprocessing)
    return model, Description(model_arguments(config.model), "float", preprocessing, parent=sha256(path))
