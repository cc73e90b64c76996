"""The schema of the one configuration that calibrate, train and convert share.

It says everything about a key: type, default, a sentence (docs/config.md is made of them), and what values are allowed.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

MISSING = "???"
RENAMED = {  # old keys, which are still read, and what they are called now
    "train.accumulate": "train.grad_accum_steps",
    "train.distill": "train.distill_weight",
    "train.distill_blocks": "train.distill_blocks_weight",
    "train.temperature": "train.distill_temperature",
    "train.augment.erase": "train.augment.random_erase",
    "calibration.choose": "calibration.choose_calibrators",
}
FREE = ("recipe.", "model.kwargs.", "data.preprocessing.")  # what is below these is not the schema's to name


def option(
    default: Any,
    help: str,
    choices: tuple[str, ...] = (),
    least: float | None = None,
    most: float | None = None,
    ordered: bool = False,
) -> Any:
    """A field of the schema.

    Args:
        default: a dict stands for an empty one of each config's own.
        help: one sentence about the key.
        choices: the values of a key that names one of a few.
        least, most: the bounds of a number, or of each number of a pair, themselves allowed.
        ordered: the first number of a pair is not above the second.
    """
    metadata = {"help": help, "choices": choices, "least": least, "most": most, "ordered": ordered}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=dict, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def section(schema: type) -> Any:
    """A field of the schema that is a schema itself."""
    return dataclasses.field(default_factory=schema)


@dataclasses.dataclass
class ModelConfig:
    """The float model: its architecture and its weights."""

    name: str = option(MISSING, "Name of the architecture, as timm or docs/models.md has it.")
    checkpoint: str | None = option(
        None,
        "Trained weights: a file (.safetensors, .pth, .pt, .bin) or a folder of transformers'; else see `pretrained`.",
    )
    pretrained: bool = option(
        False, "Download the published weights if there is no `checkpoint`; else weights are random."
    )
    num_classes: int | None = option(None, "Number of classes; null is the architecture's own.", least=1, most=10**9)
    new_head: bool = option(
        False, "Leave the checkpoint's head out: a new one is trained, with `recipe: none` and no `init`."
    )
    kwargs: dict[str, Any] = option({}, "Settings of the architecture, as its library names them.")


@dataclasses.dataclass
class DataConfig:
    """Images and how they are read."""

    root: str = option(
        MISSING,
        "Folder that holds `train` and `val`, in the layout of the model's task; calibration takes images alone too.",
    )
    workers: int | None = option(
        None,
        "Processes that decode images; 0 decodes in the process itself. null is one a core, 16 at most.",
        least=0,
        most=1024,
    )
    decoder: str = option(
        "pillow",
        "Decoder of training images; `dali` is NVIDIA's, which decodes on the GPU.",
        choices=("pillow", "dali"),
    )
    skip_unreadable: bool = option(False, "Leave out images that cannot be read instead of stopping.")
    preprocessing: dict[str, Any] = option(
        {},
        "Settings over the checkpoint's own: `size`, `mean`, `std`, `interpolation`, `crop_pct`, `crop_mode`.",
    )


@dataclasses.dataclass
class CalibrationConfig:
    """How `qswin calibrate` finds ranges, and what it does after."""

    images: int = option(512, "Number of images, drawn at random from `train`.", least=1, most=10**9)
    batch_size: int = option(32, "Images in a batch of one process.", least=1, most=10**6)
    calibrator: str | None = option(None, "Calibrator of activations, over the recipe's; null leaves the recipe's.")
    equalize: bool = option(
        True, "Scale channels between each layer and what it reads, so that one range suits all of them."
    )
    budget: float | None = option(
        None,
        "Mean KL from the float model that is allowed, over the recipe's: sites that cost more stay in float.",
        least=0,
        most=1000,
    )
    strict: bool = option(False, "Make it an error when the quantized model is far from the float one.")
    choose_calibrators: bool = option(
        False, "Choose the calibrator of each site by the output of its block; needs one process."
    )
    correct_biases: bool = option(
        False, "Correct the biases for the shift of each layer's mean output; needs one process."
    )
    reconstruct_steps: int = option(
        0,
        "Steps of training for each block, towards the float block's output, without labels; needs one process.",
        least=0,
        most=10**6,
    )
    reconstruct_lr: float = option(1e-4, "Learning rate of weights in the reconstruction.", least=0, most=10)
    reconstruct_range_lr: float = option(1e-2, "Learning rate of ranges in the reconstruction.", least=0, most=10)


@dataclasses.dataclass
class AugmentConfig:
    """Augmentation of training images."""

    scale: tuple[float, float] = option(
        (0.08, 1.0), "Smallest and largest area of the random crop, of the image's.", least=0.0001, most=1, ordered=True
    )
    ratio: tuple[float, float] = option(
        (0.75, 1.3333), "Smallest and largest width / height of the random crop.", least=0.01, most=100, ordered=True
    )
    hflip: float = option(0.5, "Probability of a flip left to right.", least=0, most=1)
    vflip: float = option(0.0, "Probability of a flip upside down.", least=0, most=1)
    rotate: float = option(0.0, "Largest angle of a rotation in degrees; segmentation only.", least=0, most=360)
    color_jitter: float = option(0.0, "Strength of random brightness, contrast and saturation.", least=0, most=10)
    auto_augment: str | None = option(None, "Policy of timm, for instance `rand-m9-mstd0.5-inc1`; classification only.")
    random_erase: float = option(0.0, "Probability of random erasing; classification only.", least=0, most=1)
    mixup: float = option(0.0, "Alpha of mixup, 0 for none; classification only.", least=0, most=100)
    cutmix: float = option(0.0, "Alpha of CutMix, 0 for none; classification only.", least=0, most=100)


@dataclasses.dataclass
class TrainConfig:
    """How `qswin train` trains."""

    epochs: int = option(1, "Passes over `train`.", least=1, most=10**5)
    batch_size: int = option(64, "Images in a batch of one process.", least=1, most=10**6)
    grad_accum_steps: int = option(
        1, "Batches whose gradients are accumulated for one step of the optimizer.", least=1, most=10**6
    )
    lr: float = option(1e-5, "Largest learning rate of AdamW.", least=1e-12, most=10)
    min_lr: float = option(0.0, "Learning rate at the end of the cosine schedule.", least=0, most=10)
    warmup_steps: int = option(0, "Steps over which the learning rate rises linearly to `lr`.", least=0, most=10**9)
    weight_decay: float = option(
        0.05, "Weight decay of matrices; biases, norms and ranges have none.", least=0, most=1000
    )
    clip_grad: float | None = option(5.0, "Largest norm of the gradient; null does not clip it.", least=0, most=1e6)
    label_smoothing: float = option(0.0, "Share of the label's probability that goes to all classes.", least=0, most=1)
    ema_decay: float | None = option(
        None, "Decay of the moving average of the weights that is validated and saved; null for none.", least=0, most=1
    )
    distill_weight: float = option(
        0.0, "Weight of the distance from the float model's output; labels have the rest.", least=0, most=1
    )
    distill_temperature: float = option(1.0, "Temperature of both outputs in that distance.", least=0.001, most=1000)
    distill_blocks_weight: float = option(
        0.0,
        "Weight of the distance of each block's output from the float model's, added to the loss.",
        least=0,
        most=1e6,
    )
    learn_ranges: bool = option(False, "Learn the quantizers' ranges, as LSQ learns step sizes.")
    range_lr: float = option(
        1e-3, "Learning rate of learned ranges: about the relative change a step.", least=0, most=10
    )
    freeze_ranges_at: float = option(
        1.0, "Share of all steps after which learned ranges stay as they are.", least=0, most=1
    )
    freeze_oscillating: float | None = option(
        None,
        "Freeze weights that change back more often than this share of the steps; 1 only counts them.",
        least=0,
        most=1,
    )
    amp: str = option("fp32", "Precision of autocast; float16 scales the loss.", choices=("fp32", "bf16", "fp16"))
    compile: bool = option(False, "Compile the model with torch.compile.")
    save_minutes: float = option(10.0, "Minutes between two writes of last.pt within an epoch.", least=0, most=1e6)
    log_every: int = option(1, "Steps between two lines of log.jsonl.", least=1, most=10**9)
    augment: AugmentConfig = section(AugmentConfig)


@dataclasses.dataclass
class Config:
    """What stands outside the sections."""

    model: ModelConfig = section(ModelConfig)
    data: DataConfig = section(DataConfig)
    recipe: Any = option(
        "auto", "What is quantized: a recipe's name, a YAML file, or the recipe written out as a mapping."
    )
    calibration: CalibrationConfig = section(CalibrationConfig)
    train: TrainConfig = section(TrainConfig)
    init: str | None = option(None, "Checkpoint that training starts from; QAT needs a calibrated one.")
    run: str = option(MISSING, "Folder that outputs are written to; it belongs to one job of each kind.")
    resume: str = option(
        "auto", "`auto` goes on with what the job left in `run`, `never` starts it over.", choices=("auto", "never")
    )
    seed: int = option(0, "Seed of everything random.", least=0, most=2**63 - 1)
    device: str = option("auto", "`auto`, `cpu`, `cuda` or another torch device.")


class Key(NamedTuple):
    """A key of the schema, such as train.lr."""

    name: str
    type: Any
    default: Any
    help: str
    choices: tuple[str, ...]
    least: float | None
    most: float | None
    ordered: bool

    def check(self, value: Any) -> None:
        """Raises ValueError for a value of the right type that nothing can be done with."""
        if value is None:
            return
        if self.choices and value not in self.choices:
            raise ValueError(f"{self.name}={value} is not known; choose {', '.join(self.choices)}")
        low, high = (-math.inf if self.least is None else self.least), (math.inf if self.most is None else self.most)
        numbers = [number for number in _each(value) if isinstance(number, int | float)]
        if not all(low <= number <= high and math.isfinite(number) for number in numbers):
            if self.least is None:
                allowed = "numbers"
            else:
                allowed = f"{self.least} or more" if self.most is None else f"{self.least} to {self.most}"
            raise ValueError(f"{self.name}={value} is out of range; give {allowed}")
        if self.ordered and numbers != sorted(numbers):
            raise ValueError(f"{self.name}={value}: give the smaller one first")


def _each(value: Any) -> list[Any]:
    """The entries of a list, of any kind, or the value itself."""
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]


def keys_of(schema: Any = Config, prefix: str = "") -> dict[str, Key]:
    """{name: key} of all keys of a schema, in order, those of its sections included."""
    keys: dict[str, Key] = {}
    for field in dataclasses.fields(schema):
        name = f"{prefix}{field.name}"
        if dataclasses.is_dataclass(field.type):
            keys |= keys_of(field.type, f"{name}.")
        else:
            default = {} if field.default is dataclasses.MISSING else field.default
            keys[name] = Key(name, field.type, default, **field.metadata)
    return keys
