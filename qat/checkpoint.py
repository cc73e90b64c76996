"""Checkpoints: a .safetensors file of tensors and a .json sidecar that says what they are."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any, Literal, NamedTuple

import safetensors.torch
import torch
from absl import logging
from timm.utils.model import unwrap_model
from torch import Tensor, nn

from qswin.calib.data.images import Preprocessing
from qswin.calib.files import (
    check_suffix,
    read_sidecar,
    sidecar_path,
    write_result,
    write_with_sidecar,
)
from qswin.calib.reading import read_json
from qswin.calib.validation import Sha256, validate
from qswin.models.checkpoints.state_dicts import check_state, mismatch, read_content, read_state
from qswin.models.registry import build_model, recognize, task_of
from qswin.qat.config import load_config
from qswin.qat.float_model import Origin, build_float_model, config_of, input_size
from qswin.qat.quant.layers import check_channel_scales
from qswin.qat.quant.quantizers import GAIN_KEY, OFF_KEY, SCALE_KEY, TensorQuantizer, is_sharded, quantizers, whole
from qswin.qat.quant.recipe import Recipe, plain_keys
from qswin.qat.quant.rewrite import enable, rewrite
from qswin.qat.schema import ModelConfig

KIND = "checkpoint"
SUFFIX = ".safetensors"
REMEDY = "save or copy both again; for bare weights give their --config"
ADDED = ("source",)  # keys that the sidecars of older versions lack
# Attributes of modules that no tensor's shape tells
UNSEEN = ("eps", "num_heads", "window_size", "shift_size", "padding", "windows")


@dataclasses.dataclass(frozen=True)
class Description:
    """What a checkpoint is, apart from its tensors: the sidecar.

    Args:
        model: build_model's arguments; where its weights once came from does not count.
        stage: "float", "ptq" or "qat".
        classes: names, in the order of the logits.
        recipe: None for a float model.
        parent: the SHA-256 of the checkpoint that this one was made from.
        metrics: what was measured when it was saved.
        source: where the trained weights once came from, and with them settings and preprocessing.
    """

    model: dict[str, Any]
    stage: Literal["float", "ptq", "qat"]
    preprocessing: Preprocessing
    classes: tuple[str, ...] | None = None
    recipe: Recipe | None = None
    parent: Sha256 | None = None
    metrics: dict[str, Any] = dataclasses.field(default_factory=dict)
    source: Origin | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.model.get("name"), str):
            raise ValueError("model has no name, or one that is not text")

    @property
    def task(self) -> str:
        """classification, segmentation, or features for a backbone."""
        return task_of(self.model)

    def to_dict(self) -> dict[str, Any]:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        recipe = None if self.recipe is None else self.recipe.to_dict()
        source = None if self.source is None else dataclasses.asdict(self.source)
        own = {"preprocessing": self.preprocessing.to_dict(), "recipe": recipe, "source": source}
        return {**values, "task": self.task, **own}

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "description") -> "Description":
        """The description that `to_dict` gave, or a sidecar's.

        Args:
            where: what the values come from; messages begin with it.

        Raises:
            ValueError: a key is missing or unknown, or a value is of another type or out of range.
        """
        values = values | {"recipe": plain_keys(values.get("recipe"))}
        return validate(values, cls, where, beside=("kind", "task", "sha256"), remedy=REMEDY)


def save_checkpoint(path: str | Path, model: nn.Module, description: Description) -> None:
    """Writes a model and its sidecar, each atomically; the sidecar, with the checksum of the tensors, last.

    Args:
        path: the name ends in .safetensors.
        model: may be in a wrapper: DistributedDataParallel, what torch.compile gives, a ModelEma of timm. One that
            fully_shard has sharded is saved by all ranks together: each calls this, and rank 0 writes. Learned ranges
            are saved as ranges.

    Raises:
        ValueError: a quantizer was never calibrated or its range is dead; the description does not fit the model; or
            the name ends otherwise.
        OSError: nothing could be written.
    """
    path, model = Path(path), unwrap_model(model)
    check_suffix("checkpoint", path, (SUFFIX,))
    for quantizer in quantizers(model):
        quantizer.check_range()
    try:
        check_description(model, description)
    except ValueError as error:
        raise ValueError(f"{path}: not saved: {error}") from error
    tensors = {name: whole(tensor).detach().cpu().contiguous() for name, tensor in tensors_of(model).items()}
    if not is_sharded(model) or torch.distributed.get_rank() == 0:
        write_with_sidecar(path, safetensors.torch.save(tensors), KIND, description.to_dict())


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint holds of a model: its state dict, with learned ranges as ranges and without `_off`."""
    state = model.state_dict()
    for path, module in model.named_modules():
        if isinstance(module, TensorQuantizer):
            state[f"{path}._amax"] = module.amax
    return without(state, OFF_KEY, GAIN_KEY)


def without(state: dict[str, Tensor], *keys: str) -> dict[str, Tensor]:
    """The tensors of a state dict apart from those of quantizers with these names."""
    return {name: tensor for name, tensor in state.items() if name.rpartition(".")[2] not in keys}


def check_description(model: nn.Module, description: Description) -> None:
    """Raises ValueError, which says what differs, unless a checkpoint of this model and description can be loaded."""
    with torch.random.fork_rng(devices=()):  # the weights of the model that is built are drawn at random
        described = _build(description)
    difference = mismatch(without(tensors_of(model), SCALE_KEY), tensors_of(described))
    if difference is not None:
        raise ValueError(f"the model is not what description.model and its recipe say: {difference}")
    size = description.preprocessing.size
    for taken, who in ((input_size(model), "the model"), (input_size(described), "what description.model builds")):
        if taken not in (None, size):
            raise ValueError(f"description.preprocessing.size is {size}, but {who} takes {taken}")
    classes, number = description.classes, getattr(model, "num_classes", None)
    if classes is not None and number not in (None, len(classes)):
        raise ValueError(f"description.classes has {len(classes)} names, but the model has {number} classes")
    unseen = _unseen_difference(model, described)
    if unseen is not None:
        raise ValueError(f"the model is not what description.model says: {unseen}")


def _unseen_difference(model: nn.Module, described: nn.Module) -> str | None:
    """How what no checkpoint holds first differs: an epsilon, heads, windows, tables that are computed."""
    remedy = "description.model lacks a setting; qswin.models.registry.read_checkpoint(NAME, FILE).settings has those"
    modules, kept = dict(described.named_modules()), described.state_dict()
    for path, module in model.named_modules():
        for name in UNSEEN:
            own, other = getattr(module, name, None), getattr(modules.get(path), name, None)
            if own is not None and other is not None and own != other:
                return f"{path}.{name} is {own}, not {other}; {remedy}"
    buffers = {name: value for name, value in described.named_buffers() if name not in kept}
    for name, value in model.named_buffers():
        if name in buffers and not torch.equal(value.cpu(), buffers[name]):
            return f"{name} has other values; {remedy}"
    return None


def _build(description: Description) -> nn.Module:
    """The model that is described, with random weights, its quantizers not calibrated."""
    arguments = {key: value for key, value in description.model.items() if key not in ("checkpoint", "pretrained")}
    model = build_model(**arguments)
    return model if description.recipe is None else rewrite(model, description.recipe)


def write_report(report: Path | None, path: Path) -> None:
    """What `--json` of the commands that make a checkpoint writes: its name, and all that its sidecar says."""
    if report is not None:
        values = {key: value for key, value in read_json(sidecar_path(path)).items() if key != "kind"}
        write_result(report, "checkpoint report", {"checkpoint": str(path), **values})


def read_description(path: Path, data: bytes | None = None) -> Description:
    """The sidecar of a checkpoint.

    Args:
        data: the checkpoint's content, where it has been read.

    Raises:
        FileNotFoundError: the checkpoint or its sidecar is missing.
        ValueError: the sidecar is malformed, or belongs to another file.
    """
    keys = [field.name for field in dataclasses.fields(Description) if field.name not in ADDED]
    values = read_sidecar(path, KIND, keys, REMEDY, data)
    return Description.from_dict(values, f"{path}: its sidecar does not describe a checkpoint")


class Loaded(NamedTuple):
    """A model, what it is, and the SHA-256 of the bytes that it was read from."""

    model: nn.Module
    description: Description
    sha256: str


def load_checkpoint(path: str | Path) -> tuple[nn.Module, Description]:
    """A model that was saved by `save_checkpoint`, ready to use: in evaluation mode, its quantizers quantizing.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the file is truncated, foreign or does not fit its sidecar.
    """
    return open_checkpoint(Path(path))[:2]


def open_checkpoint(path: Path) -> Loaded:
    """As `load_checkpoint`, with the checksum: the file is read once."""
    data = read_content(path)
    description = read_description(path, data)
    try:
        model = _build(description)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    load_state(model, read_state(path, data), path)
    enable(model)
    return Loaded(model.eval(), description, hashlib.sha256(data).hexdigest())


def load_state(model: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Loads a state into a rewritten model; channel scales come with it, wherever it has some.

    Raises:
        ValueError: the state does not fit the model; the first tensor at fault is named.
    """
    expected = model.state_dict()
    check_state(without(state, SCALE_KEY), expected, path)
    for key in state:
        if key.endswith(f".{SCALE_KEY}") and f"{key.removesuffix(SCALE_KEY)}_amax" not in expected:
            raise ValueError(f"{path}: {key} scales what the recipe leaves in float; save the checkpoint again")
    model.load_state_dict(state)
    check_channel_scales(model)


def load_model(path: Path, config_file: str | None, overrides: list[str]) -> Loaded:
    """A checkpoint; with a config file that describes them, bare float weights; or a folder of transformers.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the file is not a checkpoint, or is not what its sidecar or the config says.
    """
    if config_file is not None:
        options = ["data.root=unused", "run=unused", *overrides, f"model.checkpoint={path}"]
        config = load_config(config_file, options)
        return _of_weights(config.model, config.data.preprocessing)
    return _of_weights(_recognized(path), {}) if path.is_dir() else open_checkpoint(path)


def _recognized(folder: Path) -> ModelConfig:
    """The config of a model that save_pretrained wrote. Raises ValueError where it has no head."""
    weights, found = recognize(folder)
    if found.num_classes is None:
        raise ValueError(f"{folder}: {weights.headless}; qswin init {folder} --data DIR writes a config to train it by")
    for assumed in found.assumed:
        logging.warning("%s: assumed: %s", folder, assumed)
    return config_of(found, folder, found.num_classes)


def _of_weights(config: ModelConfig, preprocessing: dict[str, Any]) -> Loaded:
    """A float model with the weights of its config's checkpoint, and what it is."""
    floating = build_float_model(config, preprocessing)
    digest = floating.sha256
    assert digest is not None  # of model.checkpoint
    description = Description(
        floating.arguments, "float", floating.preprocessing, parent=digest, source=floating.source
    )
    return Loaded(floating.model, description, digest)
