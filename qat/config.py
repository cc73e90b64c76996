"""The one configuration of calibrate and train: a YAML file and `key=value` overrides over a typed schema."""

import dataclasses
import difflib
import re
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qswin.calib.data.images import Preprocessing
from qswin.calib.files import write_atomic
from qswin.models.registry import build_model, family_of
from qswin.qat.quant.recipe import Recipe, named_recipe

MISSING = "???"


@dataclasses.dataclass
class ModelConfig:
    name: str = MISSING
    checkpoint: str | None = None  # weights; without them the published ones (pretrained) or random ones
    pretrained: bool = False
    num_classes: int | None = None
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)  # the architecture's, as timm names them


@dataclasses.dataclass
class DataConfig:
    root: str = MISSING  # holds train/ and val/, laid out as qswin.calib.data.folders.scan_folder says
    workers: int = 4
    decoder: str = "pillow"  # of training images; or dali, NVIDIA's, which decodes on the GPU
    skip_unreadable: bool = False
    preprocessing: dict[str, Any] = dataclasses.field(default_factory=dict)  # over the model's own


@dataclasses.dataclass
class CalibrationConfig:
    images: int = 512  # drawn at random from train/
    batch_size: int = 32
    calibrator: str | None = None  # over the recipe's
    choose: bool = False  # each site's calibrator by its block's output, over both
    correct_biases: bool = False  # for the shift of each layer's mean
    reconstruct_steps: int = 0  # of training for each block; needs no labels, and one process
    reconstruct_lr: float = 1e-4
    reconstruct_range_lr: float = 1e-2


@dataclasses.dataclass
class AugmentConfig:
    scale: tuple[float, float] = (0.08, 1.0)  # area of the random crop
    ratio: tuple[float, float] = (0.75, 1.3333)
    hflip: float = 0.5
    vflip: float = 0.0
    rotate: float = 0.0  # largest angle, degrees; of segmentation
    color_jitter: float = 0.0
    auto_augment: str | None = None  # timm's, "rand-m9-mstd0.5-inc1" for instance
    erase: float = 0.0  # probability of random erasing
    mixup: float = 0.0
    cutmix: float = 0.0


@dataclasses.dataclass
class TrainConfig:
    epochs: int = 1
    batch_size: int = 64  # a process
    accumulate: int = 1  # batches an optimizer step
    lr: float = 1e-5
    min_lr: float = 0.0
    warmup_steps: int = 0
    weight_decay: float = 0.05
    clip_grad: float | None = 5.0
    label_smoothing: float = 0.0
    ema_decay: float | None = None
    distill: float = 0.0  # weight of the float model's soft labels, 0 to 1
    temperature: float = 1.0
    distill_blocks: float = 0.0  # weight of the blocks' distance from the float model's, beside the loss
    learn_ranges: bool = False
    range_lr: float = 1e-3  # of learned ranges, relative change a step
    freeze_ranges_at: float = 1.0  # share of the steps after which learned ranges stay as they are
    freeze_oscillating: float | None = None  # weights that change back more often than this a step; 1 only counts them
    amp: str = "fp32"  # or bf16, fp16
    compile: bool = False
    save_minutes: float = 10.0
    log_every: int = 1
    augment: AugmentConfig = dataclasses.field(default_factory=AugmentConfig)


@dataclasses.dataclass
class Config:
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    recipe: Any = "full"  # a name, a YAML file, or a mapping as Recipe.to_dict writes it
    calibration: CalibrationConfig = dataclasses.field(default_factory=CalibrationConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    init: str | None = None  # the checkpoint that training starts from
    run: str = MISSING  # the folder that outputs go to
    resume: str = "auto"  # or never
    seed: int = 0
    device: str = "auto"


def load_config(file: str | Path, overrides: list[str]) -> Config:
    """The schema's defaults, under the YAML file, under the overrides (`train.lr=1e-4`).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a key is not known (the nearest one is named), a value has the wrong type or is missing; where it stands
            (file and line, or the override) comes first.
    """
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such config; the ones that come with qswin are in configs/")
    config = OmegaConf.structured(Config)
    for key, value, where in (*_entries_of_file(path), *map(_entry_of_override, overrides)):
        _set(config, key, value, where)
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise ValueError(f"{path}: {missing[0]} is not set; add {missing[0]}=VALUE to the command line")
    return cast(Config, OmegaConf.to_object(config))


def _entries_of_file(path: Path) -> list[tuple[str, Any, str]]:
    """(key, value, "file:line") of every leaf of a YAML file."""
    try:
        root = yaml.compose(path.read_text(), Loader=yaml.SafeLoader)
        if not isinstance(root, yaml.MappingNode):
            raise ValueError(f"{path}: not a mapping of settings; see configs/ for examples")
        return [(key, value, f"{path}:{line}") for key, value, line in _leaves(root, "")]
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not YAML ({' '.join(str(error).split())})") from error


def _leaves(node: yaml.MappingNode, prefix: str) -> list[tuple[str, Any, int]]:
    """Sections of the schema are entered; everything else is a value, however deep."""
    leaves = []
    for key_node, value_node in node.value:
        key = f"{prefix}{key_node.value}"
        if isinstance(value_node, yaml.MappingNode) and _is_section(key):
            leaves += _leaves(value_node, f"{key}.")
        else:
            value = yaml.SafeLoader("").construct_document(value_node)
            leaves.append((key, value, key_node.start_mark.line + 1))
    return leaves


def _is_section(key: str) -> bool:
    schema: Any = Config
    for part in key.split("."):
        schema = {field.name: field.type for field in dataclasses.fields(schema)}.get(part)
        if not dataclasses.is_dataclass(schema):
            return False
    return True


def _entry_of_override(override: str) -> tuple[str, Any, str]:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ValueError(f"{override!r}: an override is written key=value, for instance train.lr=1e-4")
    try:
        return key, yaml.safe_load(text), f"override {override!r}"
    except yaml.YAMLError as error:
        raise ValueError(f"override {override!r}: the value is not YAML") from error


def _set(config: DictConfig, key: str, value: Any, where: str) -> None:
    known = _known_keys(Config)
    free = ("recipe", "model.kwargs", "data.preprocessing")  # what is below these is not the schema's to name
    if key not in known and not any(key.startswith(f"{prefix}.") for prefix in free):
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
        raise ValueError(f"{where}: unknown key {key!r}; the nearest is {near!r}")
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):
        value = float(value)  # YAML 1.1 reads 1e-4, without a dot, as text
    try:
        OmegaConf.update(config, key, value, force_add=True)
    except OmegaConfBaseException as error:
        raise ValueError(f"{where}: {key}: {str(error).splitlines()[0]}") from error


def _known_keys(schema: Any, prefix: str = "") -> list[str]:
    keys = []
    for field in dataclasses.fields(schema):
        nested = dataclasses.is_dataclass(field.type)
        keys += _known_keys(field.type, f"{prefix}{field.name}.") if nested else [f"{prefix}{field.name}"]
    return keys


def recipe_of(config: Config) -> Recipe:
    """The recipe a config names, writes out or has in a file, under the config's calibrator. Raises ValueError."""
    written = config.recipe
    if isinstance(written, str) and written.endswith((".yaml", ".yml")):
        written = _read_recipe(Path(written))
    recipe = Recipe.from_dict(written) if isinstance(written, dict) else named_recipe(str(written))
    calibrator = config.calibration.calibrator
    return recipe if calibrator is None else dataclasses.replace(recipe, calibrator=calibrator)


def _read_recipe(path: Path) -> dict[str, Any]:
    """A recipe file, as qswin search writes it."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such recipe file")
    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: not a recipe; qswin search writes one, and the README shows one")
    return values


def model_arguments(config: Config) -> dict[str, Any]:
    """build_model's arguments, without where the weights come from: what a sidecar keeps."""
    model = config.model
    return {"name": model.name, "num_classes": model.num_classes, **model.kwargs}


def build_float_model(config: Config) -> tuple[Any, Preprocessing]:
    """The float model a config describes, with its weights, and its preprocessing. Raises ValueError."""
    source, published = config.model.checkpoint, config.model.pretrained
    model = build_model(checkpoint=source, pretrained=published, **model_arguments(config))
    own = family_of(config.model.name).preprocessing(model)
    try:
        return model, Preprocessing(**{**own, **config.data.preprocessing})
    except TypeError as error:
        raise ValueError(f"data.preprocessing: {error}; its keys are {', '.join(own)}") from error


def claim_run(config: Config, stage: str, products: tuple[str, ...]) -> Path:
    """Makes the run's folder and leaves the settings there as <stage>.yaml, so that no other job overwrites its files.

    Args:
        products: the files that the stage writes; a job that has left none of them may be run again with other settings.

    Raises:
        ValueError: the folder holds this stage of a job with other settings; the first that differs is named.
    """
    folder = Path(config.run)
    everything = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.structured(config)))
    settings = {key: value for key, value in everything.items() if key not in ("run", "resume", "device")}
    file = folder / f"{stage}.yaml"
    if file.is_file() and any((folder / product).exists() for product in products):
        _compare(yaml.safe_load(file.read_text()), settings, file)
    else:
        write_atomic(file, yaml.safe_dump(settings, sort_keys=False).encode())
    return folder


def _compare(before: Any, now: Any, file: Path) -> None:
    before, now = (yaml.safe_load(yaml.safe_dump(settings)) for settings in (before, now))
    flat_before, flat_now = _flatten(before), _flatten(now)
    for key in sorted(flat_before.keys() | flat_now.keys()):
        old, new = flat_before.get(key), flat_now.get(key)
        if old != new:
            raise ValueError(
                f"{file.parent}: used by another job ({file.name} has {key}={old}, not {new}); choose another run=FOLDER"
            )


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= _flatten(inner, f"{prefix}.{key}".lstrip("."))
    return flat
