"""One step of the optimizer: forward and backward over the accumulated batches, clipping, the update, EMA."""

import contextlib
import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from qswin.calib.validation import shown
from qswin.qat.distributed import Ranks
from qswin.qat.quant.quantizers import TensorQuantizer, quantizers
from qswin.qat.schema import TrainConfig
from qswin.qat.training.images import Stream, TrainBatch, seed_everything
from qswin.qat.training.objective import Objective
from qswin.qat.training.oscillation import Oscillations


class NonFiniteLoss(ArithmeticError):
    """A loss is NaN or infinite. `indices` are the batch's images."""

    def __init__(self, message: str, indices: list[int]) -> None:
        super().__init__(message)
        self.indices = indices


class TrainStep:
    """Trains a model by one step at each call.

    Args:
        model: on the device of `ranks`; `teacher` of the objective too.
        total: steps of the whole training, which the schedules go by.
        seed: of what is random in the forward.
        no_weight_decay: how the names of parameters end that take none; see `Family`.

    Raises:
        ValueError: weights that oscillate are to be frozen, but none is quantized.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        options: TrainConfig,
        total: int,
        seed: int,
        ranks: Ranks,
        no_weight_decay: tuple[str, ...] = (),
    ) -> None:
        self.model, self.objective, self.options = model, objective, options
        self.total, self.seed, self.ranks = total, seed, ranks
        self.done = 0
        self.optimizer = torch.optim.AdamW(parameter_groups(model, options, no_weight_decay))
        self.ema = None if options.ema_decay is None else ModelEmaV3(model, decay=options.ema_decay)
        threshold = options.freeze_oscillating
        self.oscillations = None if threshold is None else Oscillations(model, threshold)
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=options.amp == "fp16")
        self.network = self._wrap()

    def _wrap(self) -> nn.Module:
        network: nn.Module = self.model
        if self.ranks.world > 1:
            devices = [self.ranks.device.index] if self.ranks.device.type == "cuda" else None
            network = DistributedDataParallel(network, devices, broadcast_buffers=False)
        if self.options.compile:
            network.compile()
        return network

    def __call__(self, batches: Iterator[TrainBatch]) -> float:
        """One step over the next `grad_accum_steps` batches.

        Returns:
            This rank's mean loss.

        Raises:
            NonFiniteLoss: the loss of a batch is NaN or infinite; nothing is updated.
        """
        self._set_rates()
        loss = sum(self._accumulate(next(batches), part) for part in range(self.options.grad_accum_steps))
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
        self.done += 1
        return loss

    def _set_rates(self) -> None:
        frozen = self.done >= self.options.freeze_ranges_at * self.total
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0 if frozen and group["ranges"] else group["base_lr"] * self.lr_factor()

    def lr_factor(self) -> float:
        """The learning rate of the next step, as a share of the largest."""
        options = self.options
        return lr_factor(self.done, self.total, options.warmup_steps, options.min_lr / options.lr)

    def _accumulate(self, batch: TrainBatch, part: int) -> float:
        """Adds a batch's gradients, its share of the step; returns its share of the loss."""
        parts = self.options.grad_accum_steps
        images = batch.images.to(self.ranks.device, non_blocking=True)
        target = batch.labels.to(self.ranks.device, non_blocking=True)
        seed_everything(self.seed, Stream.FORWARD, self.done * parts + part, self.ranks.rank)
        with self._sync(part == parts - 1):
            loss = self.objective(self.network, images, target)
            self.scaler.scale(loss / parts).backward()
        value = loss.item()
        if not math.isfinite(value):
            where = find_non_finite(self.model, images)
            remedy = "lower train.lr, or use train.amp=fp32"
            raise NonFiniteLoss(f"loss is {value} at step {self.done}; {where}; {remedy}", batch.indices.tolist())
        return value / parts

    def _sync(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """DDP sums gradients with the last of the accumulated batches only."""
        if last or not isinstance(self.network, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.network.no_sync()

    def trained(self) -> nn.Module:
        """The model to validate and keep: a copy in evaluation mode, averaged if there is an EMA, its ranges frozen."""
        model = copy.deepcopy(self.model if self.ema is None else self.ema.module)
        for quantizer in quantizers(model):
            quantizer.freeze_range()
        return model.eval()

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on."""
        return {
            "step": self.done,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "oscillations": None if self.oscillations is None else self.oscillations.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes back to what `state_dict` gave.

        Raises:
            ValueError: the state is of another model or training, or was not written by `state_dict`; what is wrong is
                named. The model may have been changed.
        """
        step = state.get("step")
        if type(step) is not int or not 0 <= step <= self.total:
            raise ValueError(f"its step is {shown(step)}; this training has {self.total} steps")
        try:
            self._load_parts(state)
        except (KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
            raise ValueError(f"it does not fit this training ({' '.join(str(error).split())[:200]})") from error
        self.done = step

    def _load_parts(self, state: dict[str, Any]) -> None:
        configured = [_options(group) for group in self.optimizer.param_groups]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for group, options in zip(self.optimizer.param_groups, configured, strict=True):
            if _options(group) != options:
                name = next(name for name in options if _options(group)[name] != options[name])
                found = f"{name}={shown(_options(group)[name])}"
                raise ValueError(f"its optimizer has {found}, the config's {name}={options[name]}")
        self._check_moments()
        self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        if self.oscillations is not None:
            self.oscillations.load_state_dict(state["oscillations"])

    def _check_moments(self) -> None:
        """AdamW takes moments of any shape; they are used only at the next step."""
        for parameter, moments in self.optimizer.state.items():
            for name in ("exp_avg", "exp_avg_sq"):
                if name in moments and moments[name].shape != parameter.shape:
                    raise ValueError(f"its optimizer's {name} has shape {tuple(moments[name].shape)}")


def _options(group: dict[str, Any]) -> dict[str, Any]:
    """What the config decides of a parameter group; `lr` is set anew at each step."""
    return {name: group.get(name) for name in ("base_lr", "weight_decay", "betas", "eps", "ranges")}


def lr_factor(step: int, total: int, warmup: int, floor: float) -> float:
    """Linear warm-up, then half a cosine from 1 to `floor` at step `total`."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def parameter_groups(model: nn.Module, options: TrainConfig, no_weight_decay: tuple[str, ...]) -> list[dict[str, Any]]:
    """Weight decay for matrices only, but for a family's exceptions; learned ranges have their own learning rate."""
    ranges, plain, decayed = [], [], []
    for name, parameter in model.named_parameters():
        if name.endswith("_log_gain"):
            ranges.append(parameter)
        elif parameter.ndim < 2 or name.endswith(no_weight_decay):
            plain.append(parameter)
        else:
            decayed.append(parameter)
    groups = [(decayed, options.lr, options.weight_decay), (plain, options.lr, 0.0), (ranges, options.range_lr, 0.0)]
    return [
        {"params": p, "lr": lr, "base_lr": lr, "weight_decay": decay, "ranges": p is ranges}
        for p, lr, decay in groups
        if p
    ]


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
    return (
        f"the first values that are not finite come out of {found[0]}" if found else "in float32 its forward is finite"
    )
