"""Fine-tunes a quantized model (QAT) or a float one. `qswin train`, or `torchrun --nproc_per_node N qat/train.py`.

A run can be killed at any moment: last.pt holds the weights, optimizer and step, everything random is a function of the
seed and the step (qat/training/images.py), and the next start goes on from there, to the same losses.
"""

import contextlib
import dataclasses
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from absl import logging
from torch import nn
from tqdm import tqdm

from qswin.calib.data.folders import ImageFolder, spread_samples
from qswin.models.registry import family_of, task_of
from qswin.qat.backends.torch_predictor import TorchPredictor
from qswin.qat.checkpoint import Description, save_checkpoint
from qswin.qat.distributed import Ranks
from qswin.qat.float_model import build_float_model, model_arguments
from qswin.qat.plan import check_readable, model_fact, plan_text, sites_fact
from qswin.qat.ptq.verdict import VERDICT_IMAGES, Comparison, Verdict, tell
from qswin.qat.quant.quantizers import quantizers
from qswin.qat.quant.recipe import RECIPES
from qswin.qat.quant.recipe_file import read_recipe
from qswin.qat.quant.rewrite import quantize
from qswin.qat.runs import Run
from qswin.qat.schema import Config
from qswin.qat.training.data import TrainingData, check_decoder, choose_decoder, scan_folders
from qswin.qat.training.images import Stream, seed_everything
from qswin.qat.training.objective import Objective
from qswin.qat.training.progress import LAST, REMEDY, Log, load_state, open_log, save_state
from qswin.qat.training.starting import checkpoint_start, float_start
from qswin.qat.training.step import NonFiniteLoss, TrainStep
from qswin.trt.evaluation.evaluate import evaluate, main_metric

CHECKED = 64  # images of each folder that a plan decodes


class Trainer:
    """One run of training, from a config.

    Raises:
        ValueError: the config cannot be trained, or the run's folder is another job's; says why.
    """

    def __init__(self, config: Config, ranks: Ranks) -> None:
        self.config, self.ranks, self.options = config, ranks, config.train
        self.task = task_of(model_arguments(config.model))
        if self.task == "features":
            raise ValueError("model.kwargs.out_features: a backbone is trained in its detector; see docs/backbones.md")
        check_decoder(config.data.decoder, self.task)
        self.run_folder = Run.of(config, "train")
        folders = scan_folders(self.task, Path(config.data.root))
        model, self.description = self._start(folders.train)
        self.model = model.to(ranks.device).train()
        self.path = self.run_folder.folder / f"{self.description.stage}.safetensors"
        if config.init is not None and Path(config.init).resolve() == self.path.resolve():
            raise ValueError(f"init={config.init}: this training would write it; choose another run=FOLDER")
        preprocessing, augment = self.description.preprocessing, self.options.augment
        images = len(folders.train.samples)
        decoder = choose_decoder(self.task, preprocessing, config.data, augment, ranks.device, images)
        self.data = TrainingData(folders, decoder, config.data, self.options.batch_size, config.seed, ranks)
        self.steps_per_epoch = len(self.data) // self.options.grad_accum_steps
        if not self.steps_per_epoch:
            raise ValueError(f"{folders.train.root}: {images} images do not fill one step; lower train.batch_size")
        self.step = self._build_step(len(folders.train.classes))
        self.last_save, self.saved_step = time.monotonic(), 0
        self.began = (time.monotonic(), 0)  # when this process began to train, at which step

    def _start(self, folder: ImageFolder) -> tuple[nn.Module, Description]:
        """The model to train, and the sidecar of what will come of it."""
        config = self.config
        seed_everything(config.seed, Stream.WEIGHTS)
        described = (config.model, config.data.preprocessing, read_recipe(config.recipe), folder)
        return float_start(*described) if config.init is None else checkpoint_start(Path(config.init), *described)

    def _build_step(self, classes: int) -> TrainStep:
        if self.options.learn_ranges:
            for quantizer in quantizers(self.model):
                quantizer.learn_range()
        objective = Objective(self.model, self._build_teacher(), self.task, classes, self.options)
        total = self.options.epochs * self.steps_per_epoch
        no_decay = family_of(self.config.model.name).no_weight_decay
        return TrainStep(self.model, objective, self.options, total, self.config.seed, self.ranks, no_decay)

    def _build_teacher(self) -> nn.Module | None:
        """The float model; made of twins where its blocks' outputs are wanted, which are then those of the model."""
        by_blocks = self.options.distill_blocks_weight > 0
        if not (self.options.distill_weight or by_blocks):
            return None
        model = self._float_model()
        return quantize(model, RECIPES["none"]) if by_blocks else model

    def _float_model(self) -> nn.Module:
        """The model that the config names, on this rank's device."""
        return build_float_model(self.config.model, self.config.data.preprocessing).model.to(self.ranks.device)

    def run(self) -> Path:
        """Trains to the end, from the beginning or from last.pt.

        Returns:
            The finished checkpoint: <run>/qat.safetensors, or float.safetensors of a float model. What the same job has
            already finished is returned as it is.

        Raises:
            ValueError: the loss is not finite, an image cannot be read, or the folder's run began with another `init`.
            KeyboardInterrupt: it was stopped; the message says what is saved.
        """
        if self._is_finished():
            logging.info("%s: already trained; train.epochs can be raised, and resume=never starts over", self.path)
            return self.path
        if self.ranks.main:
            self.run_folder.claim()
        self._resume()
        try:
            metrics = self._train()
            return self._finish(metrics or self.validate())  # a run that was killed at its end has nothing to train
        except KeyboardInterrupt as error:
            raise KeyboardInterrupt(self._kept()) from error

    def plan(self) -> str:
        """What `run` would do. A sample of the images is decoded, and nothing is written. Raises as `run` does."""
        config, options, folders = self.config, self.options, self.data.folders
        size, state = self.description.preprocessing, "from the beginning"
        if self._is_finished():
            state = f"done: {self.path} is there; train.epochs can be raised, and resume=never starts over"
        elif self._resume():
            state = f"going on at step {self.step.done} of {self.step.total}"
        for folder in folders:
            sample = spread_samples(folder, CHECKED)
            check_readable(sample, size, options.batch_size, config.data.workers, config.data.skip_unreadable)
        batch = options.batch_size * options.grad_accum_steps * self.ranks.world
        facts = {
            "model": model_fact(self.description.model, self.model, size, config.init or config.model.checkpoint),
            "recipe": "none: it stays in float" if self.description.recipe is None else sites_fact(self.model),
            "images": f"{len(folders.train.samples)} in {folders.train.root}, {len(folders.validation.samples)} in val",
            "training": f"{options.epochs} epochs of {self.steps_per_epoch} steps of {batch} images",
            "device": f"{self.ranks.device}, {self.ranks.world} processes",
            "state": state,
        }
        return plan_text("train", facts, [] if state.startswith("done") else [self.path, self.run_folder.folder / LAST])

    def _train(self) -> dict[str, float]:
        """The steps that are left; returns the metrics of the last epoch."""
        metrics: dict[str, float] = {}
        folder, self.began = self.run_folder.folder, (time.monotonic(), self.step.done)
        with open_log(folder, self.step.done) if self.ranks.main else _no_log() as log:
            while self.step.done < self.step.total:
                loss = self.train_epoch(log)
                metrics = self.validate()
                self._tell_epoch(loss, metrics)
                shares = {} if self.step.oscillations is None else self.step.oscillations.shares()
                log({"step": self.step.done, "epoch": self.step.done // self.steps_per_epoch, **metrics, **shares})
                self.save()
        return metrics

    def _kept(self) -> str:
        """What a run that is stopped has saved, and how to go on."""
        if not self.saved_step:
            return "no step is saved yet; the same command starts again"
        kept = f"{self.run_folder.folder / LAST} holds {self.saved_step} of {self.step.total} steps"
        return f"{kept}; the same command goes on from there"

    def _is_finished(self) -> bool:
        """Whether this very training has been done: from the same `init`, as many steps."""
        done = self.run_folder.finished(self.path.name)
        if done is None:
            return False
        self._check_parent(done.parent, self.path)
        return bool(done.metrics.get("steps") == self.step.total)

    def _check_parent(self, parent: str | None, path: Path) -> None:
        if parent != self.description.parent:
            what = f"was trained from another file than init={self.config.init} is now"
            raise ValueError(f"{path}: {what}; choose another run=FOLDER, or start over with resume=never")

    def _tell_epoch(self, loss: float, metrics: dict[str, float]) -> None:
        """A line of what an epoch came to, on rank 0; with the first, where to see more."""
        if not self.ranks.main:
            return
        epoch = f"epoch {self.step.done // self.steps_per_epoch} of {self.options.epochs}"
        values = ", ".join(f"{name} {value:.4g}" for name, value in {"loss": loss, **metrics}.items())
        logging.info("%s: %s; %s left", epoch, values, self._time_left())
        if self.step.done - self.began[1] <= self.steps_per_epoch:
            board = self.run_folder.folder / "tensorboard"
            logging.info("curves: tensorboard --logdir %s, then http://localhost:6006", board)

    def _time_left(self) -> str:
        """Of the whole training, at the speed so far."""
        start, first = self.began
        each = (time.monotonic() - start) / max(self.step.done - first, 1)
        return str(tqdm.format_interval(each * (self.step.total - self.step.done)))

    def train_epoch(self, log: Log) -> float:
        """The rest of the epoch that the next step lies in; returns the mean loss of its steps, on this rank."""
        losses: list[float] = []
        epoch, done = divmod(self.step.done, self.steps_per_epoch)
        accumulated = self.options.grad_accum_steps
        batches = self.data.batches(epoch, done * accumulated, self.steps_per_epoch * accumulated)
        quiet = not (self.ranks.main and sys.stderr.isatty())
        steps, name = range(done, self.steps_per_epoch), f"epoch {epoch + 1} of {self.options.epochs}"
        for _ in (bar := tqdm(steps, name, self.steps_per_epoch, initial=done, disable=quiet)):
            start, number, rate = time.perf_counter(), self.step.done, self.step.lr_factor() * self.options.lr
            try:
                losses.append(loss := self.step(batches))
            except NonFiniteLoss as error:
                raise ValueError(f"{error}; the batch's files: {self.data.files(error.indices)}") from error
            bar.set_postfix(loss=f"{loss:.4g}", lr=f"{rate:.2g}", all_left=self._time_left(), refresh=False)
            if number % self.options.log_every == 0:
                (total,) = self.ranks.sum([loss])
                images = self.options.batch_size * accumulated * self.ranks.world
                speed = images / (time.perf_counter() - start)
                log({"step": number, "loss": total / self.ranks.world, "lr": rate, "images_per_second": speed})
            if time.monotonic() - self.last_save > 60 * self.options.save_minutes:
                self.save()
        return sum(losses) / max(len(losses), 1)

    def validate(self) -> dict[str, float]:
        """{"acc1", "acc5"}, or {"dice"}, over val/, every rank taking its share."""
        predict = TorchPredictor(self.step.trained(), self.description, str(self.ranks.device))
        metric = main_metric(self.task, self.data.folders.train.classes)
        evaluate(predict, self.data.validation_batches(self.description.preprocessing), [metric])
        metric.counts = np.reshape(self.ranks.sum(metric.counts.ravel().tolist()), metric.counts.shape)
        result = metric.result()
        return {name: result[name] for name in metric.headline}

    def save(self) -> None:
        """Writes last.pt, on rank 0."""
        if self.ranks.main:
            started = {"parent": self.description.parent, "data": self.data.fingerprints}
            save_state(self.run_folder.folder, {**self.step.state_dict(), **started})
        self.last_save, self.saved_step = time.monotonic(), self.step.done

    def _resume(self) -> bool:
        """Goes back to last.pt, if any, and says whether there was one.

        Raises:
            ValueError: it cannot be read, does not fit the model or the config, or began with another `init` or other
                images.
        """
        folder = self.run_folder.folder
        state = None if self.config.resume == "never" else load_state(folder, self.ranks.device)
        if state is not None:
            if "parent" not in state:
                raise ValueError(f"{folder / LAST}: does not say which checkpoint it was trained from; {REMEDY}")
            self._check_parent(state["parent"], folder / LAST)
            try:
                self.data.check_fingerprints(state.get("data"))
                self.step.load_state_dict(state)
            except ValueError as error:
                raise ValueError(f"{folder / LAST}: {error}; {REMEDY}") from error
            self.saved_step = self.step.done
            logging.info("%s: going on at step %d of %d", folder / LAST, self.step.done, self.step.total)
        return state is not None

    def _finish(self, metrics: dict[str, float]) -> Path:
        """Saves the trained checkpoint, on rank 0, with the verdict on it.

        Raises:
            ValueError: the verdict is bad, and calibration.strict is set. The checkpoint has been saved.
        """
        if self.ranks.main:
            verdict = self._verdict()
            kept = {} if verdict is None else {"verdict": verdict.to_dict()}
            described = dataclasses.replace(self.description, metrics={**metrics, "steps": self.step.total, **kept})
            save_checkpoint(self.path, self.step.trained(), described)
            logging.info("%s: %s", self.path, ", ".join(f"{name} {value:.6g}" for name, value in metrics.items()))
            if verdict is not None:
                tell(verdict, "train longer, or with a recipe that quantizes less", self.config.calibration.strict)
        return self.path

    def _verdict(self) -> Verdict | None:
        """Of a quantized model against the float one that the config names, on images of val/; None without one."""
        if self.description.recipe is None or self.config.model.checkpoint is None:
            return None
        reference = self._float_model()
        batches, images = [], 0
        for batch in self.data.validation_batches(self.description.preprocessing):
            batches.append(torch.from_numpy(batch.images).to(self.ranks.device))
            images += len(batch.images)
            if images >= VERDICT_IMAGES:
                break
        return Comparison(self.step.trained(), batches, reference).verdict()


@contextlib.contextmanager
def _no_log() -> Iterator[Log]:
    yield lambda values: None
