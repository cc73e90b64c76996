"""Fine-tunes a quantized model (QAT) or a float one. `qswin train`, or `torchrun --nproc_per_node N qat/train.py`.

A run can be killed at any moment: `last.pt` holds the weights, optimizer and step, everything random is a function of the
seed and the step (qat/data.py), and the next start goes on from there, to the same losses.
"""

import contextlib
import copy
import dataclasses
import io
import json
import math
import pickle
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from absl import logging
from timm.data import Mixup
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from qswin.calib.data.batches import image_batches
from qswin.calib.data.folders import ImageFolder, check_class_count, scan_folder
from qswin.calib.data.shards import ImageFile
from qswin.calib.files import sha256, write_atomic
from qswin.models.registry import family_of
from qswin.qat.backends.torch_predictor import TorchPredictor
from qswin.qat.checkpoint import Description, load_checkpoint, save_checkpoint
from qswin.qat.config import Config, build_float_model, claim_run, model_arguments, recipe_of
from qswin.qat.distributed import Ranks
from qswin.qat.quant.blocks import BlockOutputs
from qswin.qat.quant.quantizers import TensorQuantizer, quantizers
from qswin.qat.quant.recipe import RECIPES
from qswin.qat.quant.rewrite import quantize
from qswin.qat.training import dali
from qswin.qat.training.data import (
    TrainBatch,
    TrainImages,
    Transform,
    epoch_batches,
    load_batches,
    seed_everything,
    train_transform,
)
from qswin.qat.training.losses import block_loss, distillation_loss, task_loss
from qswin.qat.training.oscillation import Oscillations
from qswin.trt.evaluation.evaluate import evaluate, main_metric

Log = Callable[[dict[str, float]], None]
DECODERS = ("pillow", "dali")
AMP = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Trainer:
    """One run of training: what it needs, and its steps."""

    def __init__(self, config: Config, ranks: Ranks) -> None:
        check(config)
        self.config, self.ranks, self.options = config, ranks, config.train
        self.task = family_of(config.model.name).task
        self.folder = scan_folder(self.task, Path(config.data.root) / "train")
        self.validation = scan_folder(self.task, Path(config.data.root) / "val", self.folder.classes)
        model, self.description = starting_model(config, self.folder)
        self.stage = self.description.stage
        self.run_folder = claim_run(config, "train", ("last.pt", f"{self.stage}.safetensors"))
        self.model = model.to(ranks.device).train()
        if self.options.learn_ranges:
            for quantizer in quantizers(self.model):
                quantizer.learn_range()
        self.teacher = self._build_teacher()
        self.blocks = BlockOutputs(self.model) if self.options.distill_blocks else None
        self.teacher_blocks = BlockOutputs(self.teacher) if self.teacher and self.options.distill_blocks else None
        self.optimizer = torch.optim.AdamW(parameter_groups(self.model, config))
        self.ema = None if self.options.ema_decay is None else ModelEmaV3(self.model, decay=self.options.ema_decay)
        threshold = self.options.freeze_oscillating
        self.oscillations = None if threshold is None else Oscillations(self.model, threshold)
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=self.options.amp == "fp16")
        self.transform = self._build_transform()
        self.mixup = make_mixup(config, len(self.folder.classes))
        self.steps_per_epoch = len(self._epoch(0)) // self.options.accumulate
        self.total_steps = self.options.epochs * self.steps_per_epoch
        if not self.steps_per_epoch:
            raise ValueError(
                f"{self.folder.root}: {len(self.folder.samples)} images do not fill one step; lower train.batch_size"
            )
        self.step = 0
        self.last_save = time.monotonic()
        self.network = self._wrap()

    def _build_teacher(self) -> nn.Module | None:
        """The float model; made of twins where the outputs of its blocks are wanted, which are then those of the model."""
        if not (self.options.distill or self.options.distill_blocks):
            return None
        model = build_float_model(self.config)[0].to(self.ranks.device)
        return quantize(model, RECIPES["none"]) if self.options.distill_blocks else model

    def _build_transform(self) -> Transform:
        if self.config.data.decoder == "dali":
            return dali.DrawPiece(self.options.augment)
        return train_transform(self.task, self.description.preprocessing, self.options.augment)

    def _wrap(self) -> nn.Module:
        network: nn.Module = self.model
        if self.ranks.world > 1:
            devices = [self.ranks.device.index] if self.ranks.device.type == "cuda" else None
            network = DistributedDataParallel(network, devices, broadcast_buffers=False)
        if self.options.compile:
            network.compile()
        return network

    def _epoch(self, epoch: int) -> list[list[int]]:
        samples, ranks = len(self.folder.samples), self.ranks
        return epoch_batches(samples, self.options.batch_size, ranks.rank, ranks.world, self.config.seed, epoch)

    def run(self) -> Path:
        """Trains to the end, from the beginning or from `last.pt`, and returns the finished checkpoint's path."""
        self.resume()
        metrics: dict[str, float] = {}
        with self._logs() as log:
            while self.step < self.total_steps:
                self.train_epoch(log)
                metrics = self.validate()
                shares = {} if self.oscillations is None else self.oscillations.shares()
                log({"step": self.step, "epoch": self.step // self.steps_per_epoch, **metrics, **shares})
                self.save()
        return self.finish(metrics or self.validate())  # a run that is already done has nothing to train

    def train_epoch(self, log: Log) -> None:
        """The rest of the epoch that `step` lies in."""
        epoch, done = divmod(self.step, self.steps_per_epoch)
        accumulate = self.options.accumulate
        batches = self._epoch(epoch)[done * accumulate : self.steps_per_epoch * accumulate]
        loaded = self._load(epoch, batches)
        quiet = not (self.ranks.main and sys.stderr.isatty())
        for _ in tqdm(range(done, self.steps_per_epoch), f"epoch {epoch}", disable=quiet):
            start = time.perf_counter()
            loss = self.train_step(loaded)
            if self.step % self.options.log_every == 0:
                (total,) = self.ranks.sum([loss])
                seconds = time.perf_counter() - start
                rate = self.options.batch_size * accumulate * self.ranks.world / seconds
                log(
                    {
                        "step": self.step,
                        "loss": total / self.ranks.world,
                        "lr": self.lr_factor() * self.options.lr,
                        "images_per_second": rate,
                    }
                )
            self.step += 1
            if time.monotonic() - self.last_save > 60 * self.options.save_minutes:
                self.save()

    def _load(self, epoch: int, batches: list[list[int]]) -> Iterator[TrainBatch]:
        data = self.config.data
        images = (self.folder, self.transform, self.config.seed, epoch, data.skip_unreadable)
        if data.decoder == "dali":
            preprocessing, device = self.description.preprocessing, self.ranks.device
            return dali.load_batches(dali.EncodedImages(*images), batches, preprocessing, data.workers, device)
        return load_batches(TrainImages(*images), batches, data.workers)

    def train_step(self, loaded: Iterator[TrainBatch]) -> float:
        """One optimizer step over `accumulate` batches; returns this rank's mean loss."""
        frozen = self.step >= self.options.freeze_ranges_at * self.total_steps
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0 if frozen and group["ranges"] else group["base_lr"] * self.lr_factor()
        accumulate, total = self.options.accumulate, 0.0
        for part in range(accumulate):
            batch = next(loaded)
            with self._sync(part == accumulate - 1):
                loss = self.loss(batch, part)
                self.scaler.scale(loss / accumulate).backward()
            value = loss.item()
            if not math.isfinite(value):
                raise ValueError(self.explain(value, batch))
            total += value / accumulate
        self.scaler.unscale_(self.optimizer)
        if self.options.clip_grad is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.options.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.oscillations is not None:
            self.oscillations.update()
        if self.ema is not None:
            self.ema.update(self.model)
        return total

    def _sync(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """DDP sums gradients with the last of the accumulated batches only."""
        if last or not isinstance(self.network, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.network.no_sync()

    def loss(self, batch: TrainBatch, part: int) -> Tensor:
        """Cross-entropy, mixed with the distance from the float model's output when distilling."""
        images = batch.images.to(self.ranks.device, non_blocking=True)
        target = batch.labels.to(self.ranks.device, non_blocking=True)
        seed_everything(self.config.seed, 3, self.step * self.options.accumulate + part, self.ranks.rank)
        if self.mixup is not None:
            images, target = self.mixup(images, target)
        dtype = AMP[self.options.amp]
        with torch.autocast(self.ranks.device.type, dtype, enabled=dtype is not None):
            logits = self.network(images)
            with torch.no_grad():
                soft = None if self.teacher is None else self.teacher(images).float()
        smoothing = 0.0 if self.mixup is not None else self.options.label_smoothing
        loss = task_loss(self.task, logits.float(), target, smoothing)
        if soft is not None:
            distance = distillation_loss(logits.float(), soft, self.options.temperature)
            loss = (1 - self.options.distill) * loss + self.options.distill * distance
        if self.blocks is not None and self.teacher_blocks is not None:
            loss = loss + self.options.distill_blocks * block_loss(self.blocks.take(), self.teacher_blocks.take())
        return loss

    def lr_factor(self) -> float:
        """Linear warm-up, then half a cosine from 1 to min_lr / lr, as a function of the step."""
        warmup, floor = self.options.warmup_steps, self.options.min_lr / self.options.lr
        if self.step < warmup:
            return (self.step + 1) / warmup
        progress = (self.step - warmup) / max(1, self.total_steps - warmup)
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))

    def explain(self, loss: float, batch: TrainBatch) -> str:
        """What went wrong at this step, and with which files."""
        files = [str(self.folder.samples[index][0]) for index in batch.indices.tolist()]
        site = find_non_finite(self.model, batch.images.to(self.ranks.device))
        return (
            f"loss is {loss} at step {self.step}; {site}; lower train.lr, or use train.amp=fp32;"
            f" the batch's files: {', '.join(files)}"
        )

    def trained(self) -> nn.Module:
        """The model to validate and keep: a copy in evaluation mode, averaged if there is an EMA, its ranges frozen."""
        model = copy.deepcopy(self.model if self.ema is None else self.ema.module)
        for quantizer in quantizers(model):
            quantizer.freeze_range()
        return model.eval()

    def validate(self) -> dict[str, float]:
        """{"acc1", "acc5"}, or {"dice"}, over val/, every rank taking its share."""
        predict = TorchPredictor(self.trained(), self.description, str(self.ranks.device))
        samples = self.validation.samples[self.ranks.rank :: self.ranks.world]
        skipped: list[ImageFile] | None = [] if self.config.data.skip_unreadable else None
        batches = image_batches(
            samples, self.description.preprocessing, self.options.batch_size, self.config.data.workers, skipped
        )
        metric = main_metric(self.task, self.folder.classes)
        evaluate(predict, batches, [metric])
        metric.counts = np.reshape(self.ranks.sum(metric.counts.ravel().tolist()), metric.counts.shape)
        result = metric.result()
        return {name: result[name] for name in metric.headline}

    def save(self) -> None:
        """Writes last.pt, on rank 0."""
        self.last_save = time.monotonic()
        if not self.ranks.main:
            return
        state = {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "oscillations": None if self.oscillations is None else self.oscillations.state_dict(),
        }
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_atomic(self.run_folder / "last.pt", buffer.getvalue())

    def resume(self) -> None:
        """Goes back to last.pt, if there is one and `resume` is auto. Raises ValueError when it cannot be read."""
        path = self.run_folder / "last.pt"
        if self.config.resume != "auto" or not path.is_file():
            return
        try:
            state = torch.load(path, map_location=self.ranks.device, weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise ValueError(f"{path}: cannot be read; delete it, or start over with resume=never") from error
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        if self.oscillations is not None:
            self.oscillations.load_state_dict(state["oscillations"])
        logging.info("%s: going on at step %d of %d", path, self.step, self.total_steps)

    def finish(self, metrics: dict[str, float]) -> Path:
        """Saves the trained checkpoint: <run>/qat.safetensors, or float.safetensors of a float model."""
        path = self.run_folder / f"{self.stage}.safetensors"
        if self.ranks.main:
            save_checkpoint(path, self.trained(), self.description_with(metrics))
            logging.info("%s: %s", path, ", ".join(f"{name} {value:.6g}" for name, value in metrics.items()))
        return path

    def description_with(self, metrics: dict[str, float]) -> Description:
        """The sidecar of the finished checkpoint."""
        return dataclasses.replace(self.description, metrics={**metrics, "steps": self.total_steps})

    @contextlib.contextmanager
    def _logs(self) -> Iterator[Log]:
        """log.jsonl and TensorBoard on rank 0; lines of steps that are about to be repeated are dropped."""
        if not self.ranks.main:
            yield lambda values: None
            return
        path = self.run_folder / "log.jsonl"
        lines = path.read_text().splitlines() if path.is_file() and self.step else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] < self.step]
        write_atomic(path, "".join(f"{line}\n" for line in kept).encode())
        with open(path, "a") as file, SummaryWriter(str(self.run_folder / "tensorboard"), purge_step=self.step) as board:

            def log(values: dict[str, float]) -> None:
                file.write(json.dumps(values) + "\n")
                file.flush()
                for name, value in values.items():
                    board.add_scalar(name, value, values["step"])

            yield log


def check(config: Config) -> None:
    """Raises ValueError for settings that the schema's types let through."""
    if config.train.amp not in AMP:
        raise ValueError(f"train.amp={config.train.amp} is not known; choose {', '.join(AMP)}")
    if config.resume not in ("auto", "never"):
        raise ValueError(f"resume={config.resume} is not known; choose auto or never")
    if config.data.decoder not in DECODERS:
        raise ValueError(f"data.decoder={config.data.decoder} is not known; choose {', '.join(DECODERS)}")
    if config.data.decoder == "dali" and family_of(config.model.name).task != "classification":
        raise ValueError("data.decoder=dali is for classification; set data.decoder=pillow")
    if not 0 <= config.train.distill <= 1:
        raise ValueError(f"train.distill={config.train.distill} is not a weight; give 0 to 1")
    if not 0 <= config.train.freeze_ranges_at <= 1:
        raise ValueError(f"train.freeze_ranges_at={config.train.freeze_ranges_at} is no share of the steps; give 0 to 1")
    for name in ("epochs", "batch_size", "accumulate", "log_every"):
        if getattr(config.train, name) < 1:
            raise ValueError(f"train.{name} must be 1 or more")


def starting_model(config: Config, folder: ImageFolder) -> tuple[nn.Module, Description]:
    """The model to train and the sidecar of what will come of it.

    Raises:
        ValueError: QAT without a calibrated checkpoint, or a checkpoint of another recipe or other classes.
    """
    recipe = recipe_of(config)
    if config.init is not None:
        model, description = load_checkpoint(config.init)
        started = description.recipe.name if description.recipe else "none"
        if started != recipe.name:
            raise ValueError(
                f"{config.init}: its recipe is {started!r}, the config's is {recipe.name!r}; set recipe={started}"
            )
        if description.classes is not None and description.classes != folder.classes:
            raise ValueError(f"{folder.root}: its classes are not those of {config.init}")
        stage = "qat" if description.recipe else "float"
        parent = sha256(config.init)
        return model, dataclasses.replace(description, stage=stage, classes=folder.classes, parent=parent)
    if recipe.rules:
        raise ValueError(
            "QAT starts from a calibrated checkpoint: run qswin calibrate first and give init=<run>/ptq.safetensors"
        )
    model, preprocessing = build_float_model(config)
    check_class_count(folder.root, len(folder.classes), model.num_classes)
    return model, Description(model_arguments(config), "float", preprocessing, folder.classes)


def parameter_groups(model: nn.Module, config: Config) -> list[dict[str, Any]]:
    """Weight decay for matrices only; learned ranges have their own learning rate and no decay."""
    ranges, plain, decayed = [], [], []
    no_decay = family_of(config.model.name).no_weight_decay
    for name, parameter in model.named_parameters():
        if name.endswith("_log_gain"):
            ranges.append(parameter)
        elif parameter.ndim < 2 or name.endswith(no_decay):
            plain.append(parameter)
        else:
            decayed.append(parameter)
    options = config.train
    groups = [(decayed, options.lr, options.weight_decay), (plain, options.lr, 0.0), (ranges, options.range_lr, 0.0)]
    return [
        {"params": p, "lr": lr, "base_lr": lr, "weight_decay": decay, "ranges": p is ranges} for p, lr, decay in groups if p
    ]


def make_mixup(config: Config, classes: int) -> Mixup | None:
    """timm's mixup and cutmix, or None when neither is asked for."""
    augment = config.train.augment
    if not (augment.mixup or augment.cutmix):
        return None
    return Mixup(augment.mixup, augment.cutmix, label_smoothing=config.train.label_smoothing, num_classes=classes)


def find_non_finite(model: nn.Module, images: Tensor) -> str:
    """Names the quantizer whose range is no longer finite, or else the first module that puts out NaN or infinity."""
    for quantizer in quantizers(model):
        if not quantizer.amax.isfinite().all():
            return f"the range of {quantizer.site} is {quantizer.amax.max().item()}"
    found: list[str] = []

    def watch(name: str, module: nn.Module) -> Any:
        def hook(_: nn.Module, inputs: Any, output: Any) -> None:
            if not found and isinstance(output, Tensor) and not output.isfinite().all():
                found.append(module.site if isinstance(module, TensorQuantizer) else name)

        return module.register_forward_hook(hook)

    leaves = [(name, module) for name, module in model.named_modules() if not any(module.children())]
    handles = [watch(name, module) for name, module in leaves]
    try:
        with torch.no_grad():
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    return f"the first values that are not finite come out of {found[0]}" if found else "in float32 its forward is finite"
