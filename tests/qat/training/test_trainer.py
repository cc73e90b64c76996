"""The trainer: killed and resumed, on several ranks, stopped by bad numbers."""

import copy
import inspect
import itertools
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from qswin.calib.data.folders import scan_folder
from qswin.calib.data.images import Preprocessing, open_image
from qswin.qat.checkpoint import load_checkpoint
from qswin.qat.config import load_config
from qswin.qat.distributed import process_group
from qswin.qat.ptq.job import run_calibration
from qswin.qat.quant.blocks import blocks
from qswin.qat.quant.quantizers import quantizers
from qswin.qat.schema import AugmentConfig
from qswin.qat.training import trainer as train
from qswin.qat.training.images import Stream, epoch_batches, seed_everything, train_transform
from qswin.qat.training.progress import load_state
from qswin.qat.training.step import TrainStep, find_non_finite
from tests.helpers import UNET, small_swin, write_masks, write_shards

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def ptq(config_file):
    with process_group("cpu") as ranks:
        return run_calibration(load_config(config_file, []), ranks)


def run(config_file, *overrides) -> tuple[Path, list[dict]]:
    """Trains in this process; returns the run's folder and its log."""
    config = load_config(config_file, list(overrides))
    with process_group("cpu") as ranks:
        path = train.Trainer(config, ranks).run()
    return path, read_log(path.parent)


def read_log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def losses(log: list[dict]) -> dict[int, float]:
    return {entry["step"]: entry["loss"] for entry in log if "loss" in entry}


def command(config_file, *overrides) -> list[str]:
    return [sys.executable, str(ROOT / "qat" / "train.py"), "--config", str(config_file), *overrides]


def launcher(*options: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", *options, str(ROOT / "qat" / "train.py")]


SLOW = pytest.mark.slow
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def test_qat_writes_a_checkpoint_and_learns(config_file, ptq):
    path, log = run(config_file, f"init={ptq}", "train.epochs=6", "train.learn_ranges=true", "train.ema_decay=0.5")
    assert path.name == "qat.safetensors"
    _, description = load_checkpoint(path)
    assert description.stage == "qat" and description.metrics["steps"] == 30
    loss = losses(log)
    assert sum(loss[i] for i in range(25, 30)) < sum(loss[i] for i in range(5))


@pytest.fixture
def masks_config(tmp_path) -> Path:
    """A config for a small Swin-Unet over mask folders."""
    settings = ", ".join(f"{key}: {value}" for key, value in UNET.items())
    file = tmp_path / "masks.yaml"
    file.write_text(f"""\
model: {{name: swin_unet_tiny_patch4_window7_224, num_classes: 3, kwargs: {{{settings}}}}}
data: {{root: {write_masks(tmp_path / "masks", side=40)}, workers: 0}}
calibration: {{images: 6, batch_size: 3}}
train:
  batch_size: 3
  lr: 1.0e-3
  distill_weight: 0.5
  augment: {{scale: [0.7, 1.0], rotate: 20, vflip: 0.5, color_jitter: 0.1}}
run: {tmp_path / "masks-run"}
device: cpu
""")
    return file


def test_blocks_are_distilled_and_ranges_frozen(config_file, ptq):
    """From the float model's own weights the blocks' distance is quantization's; frozen ranges do not move."""
    options = [
        "train.distill_weight=1",
        "train.distill_blocks_weight=1",
        "train.learn_ranges=true",
        "train.freeze_ranges_at=0",
    ]
    path, log = run(config_file, f"init={ptq}", "train.epochs=2", "train.ema_decay=0.5", *options)
    assert all(0 < loss < 1 for loss in losses(log).values())
    before, after = (load_checkpoint(file)[0].state_dict() for file in (ptq, path))
    ranges = [name for name in before if name.endswith("_input_quantizer._amax")]
    assert ranges and all(torch.equal(before[name], after[name]) for name in ranges)
    weight = "layers.0.blocks.0.attn.qkv.weight"
    assert not torch.equal(before[weight], after[weight])


def test_recorded_outputs_are_the_blocks_own(config_file, ptq):
    """In order, with gradients, and not those of a copy."""
    trainer = make_trainer(config_file, ptq, "train.distill_blocks_weight=1")
    images = torch.randn(2, 3, 32, 32)
    twin = copy.deepcopy(trainer.model)
    twin(images)
    assert trainer.step.objective.blocks.take() == []
    (hook,) = blocks(twin)[0]._forward_hooks.values()
    assert not inspect.ismethod(hook)  # its own list would grow with every validation batch
    seen = []
    for block in blocks(trainer.model):
        block.register_forward_hook(lambda _, arguments, output: seen.append(output))
    trainer.model(images)
    taken = trainer.step.objective.blocks.take()
    assert len(taken) == len(seen) == 4 and all(a is b and a.requires_grad for a, b in zip(taken, seen, strict=True))


@pytest.mark.slow
def test_masks_train_too(masks_config):
    with process_group("cpu") as ranks:
        start = run_calibration(load_config(masks_config, []), ranks)
    path, log = run(masks_config, f"init={start}", "train.epochs=8")
    model, description = load_checkpoint(path)
    assert description.task == "segmentation" and 0 < description.metrics["dice"] <= 1
    assert description.classes == ("background", "left", "right")
    loss = losses(log)
    assert sum(loss[i] for i in range(12, 16)) < sum(loss[i] for i in range(4))


def test_an_augmentation_of_another_task_is_named(masks_config, config_file):
    for file, setting, task in (
        (masks_config, "mixup=0.2", "segmentation"),
        (config_file, "rotate=9", "classification"),
    ):
        with pytest.raises(ValueError, match=f"train.augment.{setting.partition('=')[0]} is not for {task}"):
            run(file, "recipe=none", f"train.augment.{setting}")


@pytest.mark.parametrize("task", ["classification", "segmentation"])
def test_transforms_go_to_worker_processes(task):
    """Pickled, where processes are not forked (from Python 3.14)."""
    transform = train_transform(task, Preprocessing(size=(8, 8)), AugmentConfig())
    assert type(pickle.loads(pickle.dumps(transform))) is type(transform)  # noqa: S301  # our own bytes


def test_a_mask_turns_with_its_image(masks_config):
    """An image that is its own mask still is after every change of geometry."""
    config = load_config(masks_config, ["train.augment.color_jitter=0"])
    preprocessing = Preprocessing(size=(40, 40), mean=(0, 0, 0), std=(1, 1, 1), interpolation="bilinear")
    folder = scan_folder("segmentation", Path(config.data.root) / "train")
    transform = train_transform("segmentation", preprocessing, config.train.augment)
    for index, (_, mask) in enumerate(folder.samples):
        seed_everything(0, Stream.AUGMENTATION, index)
        image, changed = transform(open_image(mask, "RGB"), mask)
        inside = image[0] * 255 - changed
        assert (inside.abs() < 0.01).float().mean() > 0.8  # the others are interpolated, at edges
        assert changed.unique().numel() > 1 or not open_image(mask).getbbox()


def test_a_float_model_trains_with_the_same_file(config_file):
    path, _ = run(config_file, "recipe=none", "train.augment.mixup=0.2", "train.grad_accum_steps=2")
    model, description = load_checkpoint(path)
    assert path.name == "float.safetensors" and description.recipe is None and not list(quantizers(model))


def test_a_float_model_without_a_checkpoint_starts_from_its_seed(config_file, tmp_path):
    """Whatever has been drawn before: the same seed trains to the same weights, another seed does not."""

    def weights(name: str, seed: int) -> torch.Tensor:
        torch.manual_seed(len(name))
        options = ("recipe=none", "model.checkpoint=null", f"run={tmp_path / name}", f"seed={seed}")
        return load_checkpoint(run(config_file, *options)[0])[0].patch_embed.proj.weight

    first = weights("first", 0)
    assert torch.equal(weights("again", 0), first)
    assert not torch.allclose(weights("other", 1), first, atol=0.01)


@pytest.mark.slow
def test_learned_ranges_move_and_are_kept(config_file, ptq):
    path, _ = run(config_file, f"init={ptq}", "train.learn_ranges=true", "train.range_lr=0.05")
    before, after = ({q.site: q.amax for q in quantizers(load_checkpoint(file)[0])} for file in (ptq, path))
    moved = [site for site in before if not torch.allclose(before[site], after[site], rtol=0.01)]
    assert len(moved) > len(before) / 2
    assert all((amax > 0).all() for amax in after.values())


@pytest.mark.slow
def test_a_compiled_run_has_the_same_losses(config_file, ptq, tmp_path, monkeypatch):
    """Traced by Dynamo and AOTAutograd; Inductor's code would take a minute to compile."""
    compile_module, compiled = torch.nn.Module.compile, []

    def traced(module: torch.nn.Module) -> None:
        compiled.append(module)
        compile_module(module, backend="aot_eager")

    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    options = (f"init={ptq}", "train.learn_ranges=true", "train.ema_decay=0.9", "train.distill_weight=0.5")
    _, plain = run(config_file, *options, f"run={tmp_path / 'plain'}")
    _, fast = run(config_file, *options, f"run={tmp_path / 'fast'}", "train.compile=true")
    assert len(compiled) == 1
    assert list(losses(fast).values()) == pytest.approx(list(losses(plain).values()), rel=1e-4)


@pytest.mark.slow
def test_weights_that_oscillate_are_counted_and_frozen(config_file, ptq):
    options = (f"init={ptq}", "train.epochs=3", "train.lr=0.01", "train.clip_grad=null")
    shares = {}
    for threshold in (0, 1):
        folder = f"run={config_file.parent / str(threshold)}"
        _, log = run(config_file, *options, folder, f"train.freeze_oscillating={threshold}")
        shares[threshold] = next(entry for entry in reversed(log) if "frozen" in entry)
    assert shares[1]["oscillating"] > 0 and shares[1]["frozen"] == 0
    assert shares[0]["frozen"] > 0


@SLOW
@pytest.mark.parametrize("seconds", [0.0, 0.7, 1.5])
def test_a_killed_run_goes_on_to_the_same_losses(config_file, ptq, tmp_path, seconds):
    """SIGKILL some time after the first step, then a second start, against a run that nobody disturbed."""
    options = (
        f"init={ptq}",
        "train.epochs=8",
        "train.ema_decay=0.9",
        "train.save_minutes=0.003",
        "train.distill_weight=0.5",
    )
    options += ("train.freeze_oscillating=0.02",)
    _, undisturbed = run(config_file, *options, f"run={tmp_path / 'whole'}")
    folder = tmp_path / "killed"
    arguments = command(config_file, *options, f"run={folder}")
    process = subprocess.Popen(arguments, env=os.environ, start_new_session=True)
    while not (folder / "last.pt").is_file() and process.poll() is None:
        time.sleep(0.01)
    time.sleep(seconds)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL  # it was killed before it was done
    subprocess.run(arguments, check=True)
    resumed = losses(read_log(folder))
    expected = losses(undisturbed)
    assert list(resumed) == list(expected)
    assert list(resumed.values()) == pytest.approx(list(expected.values()), rel=1e-5)
    first, second = (load_checkpoint(f / "qat.safetensors")[0].state_dict() for f in (tmp_path / "whole", folder))
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-4, atol=1e-6)


PLAIN = ("train.augment.hflip=0", "train.augment.scale=[1, 1]", "train.augment.ratio=[1, 1]", "train.lr=1e-5")


@SLOW
def test_two_nodes_of_two_ranks_train_as_one_process(config_file, ptq, tmp_path):
    """DDP averages gradients: four ranks of batch 1, met through a rendezvous, follow one process of batch 4."""
    same = (f"init={ptq}", *PLAIN)
    _, one = run(config_file, *same, f"run={tmp_path / 'one'}")
    nodes = ["--nnodes=2", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:29614", "--rdzv_id=test"]
    launch = launcher("--nproc_per_node=2", *nodes)
    arguments = [*launch, "--config", str(config_file), *same, "train.batch_size=1", f"run={tmp_path / 'four'}"]
    both = [subprocess.Popen(arguments, env=ENVIRONMENT) for _ in range(2)]
    assert [node.wait() for node in both] == [0, 0]
    four = losses(read_log(tmp_path / "four"))
    assert list(four.values()) == pytest.approx(list(losses(one).values()), rel=2e-2)
    states = (load_checkpoint(tmp_path / name / "qat.safetensors")[0].state_dict() for name in ("one", "four"))
    for first, second in zip(*(state.values() for state in states), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_rank_that_stands_still_for_a_while_changes_nothing(config_file, ptq, tmp_path):
    """SIGSTOP of one of two ranks for three seconds (QSWIN_STOP in the environment: another number), then SIGCONT."""
    same = (f"init={ptq}", *PLAIN, "train.epochs=4", "train.save_minutes=0.003", "train.batch_size=2")
    states = []
    for name in ("undisturbed", "stopped"):
        arguments = [*launcher("--nproc_per_node=2", "--master_port=29617"), "--config", str(config_file), *same]
        process = subprocess.Popen([*arguments, f"run={tmp_path / name}"], env=ENVIRONMENT)
        if name == "stopped":
            stop_for_a_while(ranks_of(process.pid)[1], tmp_path / name / "last.pt")
        assert process.wait() == 0
        states.append((losses(read_log(tmp_path / name)), load_checkpoint(tmp_path / name / "qat.safetensors")[0]))
    (first, whole), (second, stopped) = states
    assert first == second
    for before, after in zip(whole.state_dict().values(), stopped.state_dict().values(), strict=True):
        assert torch.equal(before, after)


def ranks_of(launcher: int) -> list[int]:
    """The two processes that torchrun has started, once they are there."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children")
    while len(found := children.read_text().split()) < 2:
        time.sleep(0.01)
    return sorted(map(int, found))


def stop_for_a_while(process: int, begun: Path) -> None:
    """Once a file is there, stops a process, and lets it go on."""
    while not begun.is_file():
        time.sleep(0.01)
    os.kill(process, signal.SIGSTOP)
    time.sleep(float(os.environ.get("QSWIN_STOP", 3)))
    os.kill(process, signal.SIGCONT)


def test_a_clock_that_goes_back_changes_nothing(config_file, tmp_path, monkeypatch):
    """Each look at the wall clock is an hour before the one before, and so are the times of files."""
    _, before = run(config_file, "recipe=none", f"run={tmp_path / 'before'}")
    now, real = itertools.count(2_000_000_000, -3600), os.replace

    def replaced(source, target):
        real(source, target)
        os.utime(target, (next(now),) * 2)

    monkeypatch.setattr(time, "time", lambda: float(next(now)))
    monkeypatch.setattr(os, "replace", replaced)
    settings = ("recipe=none", "train.save_minutes=0.0001", f"run={tmp_path / 'after'}")
    _, first = run(config_file, *settings)
    assert losses(first) == losses(before)
    assert all(entry["images_per_second"] > 0 for entry in first if "loss" in entry)
    _, longer = run(config_file, *settings, "train.epochs=2")
    assert losses(longer).items() > losses(first).items() and len(losses(longer)) == 2 * len(losses(first))


@pytest.mark.slow
def test_a_rank_that_dies_stops_the_other_and_both_go_on(config_file, ptq, tmp_path):
    """The rank that waits for the dead one ends too, soon; started again, both end as one undisturbed process does."""
    same = (f"init={ptq}", *PLAIN, "train.epochs=4", "train.save_minutes=0.003")
    _, one = run(config_file, *same, f"run={tmp_path / 'one'}")
    folder = tmp_path / "killed"
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29613"]
    launch += ["-m", "qswin", "train"]
    launch += ["--config", str(config_file), *same, "train.batch_size=2", f"run={folder}"]
    agent = subprocess.Popen(launch, env=ENVIRONMENT)
    while not (folder / "last.pt").is_file() and agent.poll() is None:
        time.sleep(0.01)
    first, *others = (child for child in psutil.Process(agent.pid).children() if "qswin" in child.cmdline())
    first.kill()
    try:
        assert agent.wait(timeout=60) != 0 and others and not any(other.is_running() for other in others)
    finally:
        agent.kill()
    subprocess.run(launch, check=True, env=ENVIRONMENT)
    expected, found = (losses(read_log(path)) for path in (tmp_path / "one", folder))
    assert list(found) == list(expected)
    assert list(found.values()) == pytest.approx(list(expected.values()), rel=2e-2)


def test_shards_train_as_the_folder_they_were_made_of(config_file, ptq, data, tmp_path):
    folder = scan_folder("classification", data / "train")
    for split in ("train", "val"):
        write_shards(scan_folder("classification", data / split), tmp_path / "shards" / split)
    (tmp_path / "shards" / "classes.txt").write_text("\n".join(folder.classes))
    _, expected = run(config_file, f"init={ptq}", f"run={tmp_path / 'folder-run'}")
    _, found = run(config_file, f"init={ptq}", f"run={tmp_path / 'shards-run'}", f"data.root={tmp_path / 'shards'}")
    assert losses(found) == losses(expected)


def test_batches_of_all_ranks_are_one_permutation():
    parts = [epoch_batches(103, 4, rank, 3, seed=1, epoch=2) for rank in range(3)]
    dealt = [index for part in parts for batch in part for index in batch]
    assert len(dealt) == len(set(dealt)) == 96 and {len(part) for part in parts} == {8}
    whole = epoch_batches(103, 12, 0, 1, seed=1, epoch=2)
    assert [sorted(batch) for batch in whole] == [sorted(sum(step, [])) for step in zip(*parts, strict=True)]
    assert whole != epoch_batches(103, 12, 0, 1, seed=1, epoch=3)


def test_workers_do_not_change_the_losses(config_file, ptq, tmp_path):
    logs = [run(config_file, f"init={ptq}", f"data.workers={n}", f"run={tmp_path / str(n)}")[1] for n in (0, 2)]
    assert losses(logs[0]) == losses(logs[1])


@pytest.mark.parametrize(
    ("minutes", "words"),
    [
        (0, r"run/last\.pt holds 3 of 5 steps; the same command goes on from there"),
        (9, "no step is saved yet; the same command starts again"),
    ],
)
def test_a_run_that_is_stopped_says_what_is_saved(config_file, monkeypatch, minutes, words):
    whole = TrainStep.__call__

    def step(self, batches):
        if self.done == 3:
            raise KeyboardInterrupt
        return whole(self, batches)

    monkeypatch.setattr(TrainStep, "__call__", step)
    with pytest.raises(KeyboardInterrupt, match=words):
        run(config_file, "recipe=none", f"train.save_minutes={minutes}")


def test_a_loss_that_is_not_finite_names_step_files_and_site(config_file, ptq):
    trainer = make_trainer(config_file, ptq)
    broken = trainer.model.layers[1].blocks[0].mlp.fc2
    broken._input_quantizer._amax.fill_(float("inf"))
    with pytest.raises(
        ValueError, match=r"loss is nan at step 0; the range of layers\.1\.blocks\.0\.mlp\.fc2 is inf.*\.png"
    ):
        trainer.run()


def test_values_that_are_not_finite_are_traced_to_the_first_module():
    model = small_swin()
    with torch.no_grad():
        model.layers[0].blocks[1].mlp.fc1.weight[0, 0] = float("nan")
    assert "layers.0.blocks.1.mlp.fc1" in find_non_finite(model, torch.randn(1, 3, 32, 32))


def make_trainer(config_file, ptq, *overrides) -> train.Trainer:
    with process_group("cpu") as ranks:
        return train.Trainer(load_config(config_file, [f"init={ptq}", *overrides]), ranks)


def test_the_learning_rate_warms_up_and_follows_a_cosine(config_file, ptq):
    trainer = make_trainer(config_file, ptq, "train.epochs=4", "train.warmup_steps=4", "train.min_lr=1e-4")
    factors = []
    for trainer.step.done in range(21):
        factors.append(trainer.step.lr_factor())
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[12] == pytest.approx((1 + 0.1) / 2) and factors[20] == pytest.approx(0.1)


def test_weight_decay_is_for_matrices_and_ranges_have_their_own_rate(config_file, ptq):
    trainer = make_trainer(config_file, ptq, "train.learn_ranges=true", "train.range_lr=0.5")
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    groups = [
        ({names[id(p)] for p in g["params"]}, g["weight_decay"], g["lr"]) for g in trainer.step.optimizer.param_groups
    ]
    (decayed, decay, _), (plain, none, _), (ranges, of_ranges, rate) = groups
    assert decay == 0.05 and none == of_ranges == 0 and rate == 0.5
    assert all(name.endswith("_log_gain") for name in ranges) and len(ranges) == len(list(quantizers(trainer.model)))
    assert all(name.endswith(".weight") for name in decayed) and any("relative_position" in name for name in plain)
    assert len(decayed | plain | ranges) == len(names)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([], "QAT starts from a calibrated checkpoint"),
        (["init=PTQ", "recipe=none"], "its recipe is 'full', the config's is 'none'"),
        (["init=PTQ", "train.amp=fp8"], "fp32, bf16, fp16"),
        (["init=PTQ", "train.freeze_ranges_at=2"], "freeze_ranges_at=2.*0 to 1"),
        (["init=PTQ", "train.batch_size=21"], "do not fill one step"),
        (["init=PTQ", "train.epochs=0"], r"train\.epochs=0 is out of range; give 1 to 100000"),
    ],
)
def test_jobs_that_cannot_run_say_why(config_file, ptq, overrides, words):
    with pytest.raises(ValueError, match=words):
        run(config_file, *(override.replace("PTQ", str(ptq)) for override in overrides))


def test_a_broken_last_pt_says_what_to_do(config_file, ptq):
    path, _ = run(config_file, f"init={ptq}")
    (path.parent / "last.pt").write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match=r"last\.pt: cannot be read; delete it"):
        run(config_file, f"init={ptq}", "train.epochs=2")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: [state], "not the state of a training but a list"),
        (lambda state: state | {"step": 7.0}, r"its step is 7\.0; this training has 10 steps"),
        (lambda state: state | {"step": 11}, "its step is 11; this training has 10 steps"),
        (lambda state: state | {"step": -1}, "its step is -1"),
        (lambda state: state | {"model": {}}, "it does not fit this training"),
        (lambda state: state | {"model": 3}, "it does not fit this training"),
        (lambda state: state | {"optimizer": None}, "it does not fit this training"),
        (
            lambda state: {key: value for key, value in state.items() if key != "scaler"},
            "it does not fit this training",
        ),
        (
            lambda state: with_group(state, base_lr=1e6),
            r"its optimizer has base_lr=1000000\.0, the config's base_lr=0.001",
        ),
        (lambda state: with_group(state, betas=(2.0, 2.0)), "its optimizer has betas="),
        (lambda state: with_moments(state, torch.zeros(3)), r"its optimizer's exp_avg has shape \(3,\)"),
        (lambda state: state | {"data": 3}, "it does not say which images"),
        (
            lambda state: state | {"data": state["data"] | {"train": state["data"]["train"] | {"images": 25}}},
            r"images in train/ have changed since training began \(25 images, now 20\)",
        ),
        (lambda state: without(state, "data"), "does not say which images it was trained on"),
        (lambda state: without(state, "parent"), "does not say which checkpoint it was trained from"),
    ],
)
def test_a_last_pt_that_is_not_this_trainings_is_refused(trained, change, words):
    config_file, path = trained
    state = torch.load(path.parent / "last.pt", weights_only=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "load_state", lambda folder, device: checked(folder, change(copy.deepcopy(state))))
        with pytest.raises(ValueError, match=rf"last\.pt: .*{words}.*; delete it, or start over with resume=never"):
            run(config_file, "recipe=none", "train.epochs=2")


def checked(folder, state):
    """What `load_state` says of a state that is in a file."""
    torch.save(state, folder / "changed" / "last.pt")
    return load_state(folder / "changed", torch.device("cpu"))


def without(state, key):
    return {name: value for name, value in state.items() if name != key}


def with_group(state, **options):
    state["optimizer"]["param_groups"][0].update(options)
    return state


def with_moments(state, moments):
    state["optimizer"]["state"][0]["exp_avg"] = moments
    return state


@pytest.fixture
def trained(config_file):
    path, _ = run(config_file, "recipe=none")
    (path.parent / "changed").mkdir()
    return config_file, path


def swapped(root):
    first, second = (sorted((root / "train" / f"class{label}").iterdir())[0] for label in (0, 1))
    first.rename(first.with_name("renamed.png"))


def emptied(root):
    for file in sorted((root / "train").rglob("*.png"))[::2]:
        file.unlink()


def moved(root):
    first, second = (sorted((root / "val" / f"class{label}").iterdir())[0] for label in (0, 1))
    first.rename(second.with_name("more.png"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (swapped, r"train/ have changed since training began \(other files or labels\)"),
        (moved, r"val/ have changed since training began \(other files or labels\)"),
        (emptied, r"train/ have changed since training began \(20 images, now 10\)"),
    ],
)
def test_training_does_not_go_on_with_other_images(config_file, data, change, words):
    run(config_file, "recipe=none")
    change(data)
    with pytest.raises(ValueError, match=words):
        run(config_file, "recipe=none", "train.epochs=2")


def test_training_goes_on_where_its_images_were_moved_to(config_file, data):
    run(config_file, "recipe=none")
    data.rename(data.with_name("elsewhere"))
    path, log = run(config_file, "recipe=none", "train.epochs=2", f"data.root={data.with_name('elsewhere')}")
    assert max(losses(log)) == 9


@pytest.mark.parametrize("policy", ["evil", "rand-m9-n1000000000", "augmix-w101", "rand-m9-xyz1"])
def test_policies_that_timm_lacks_or_that_would_not_end_are_refused(policy):
    with pytest.raises(ValueError, match=f"train.augment.auto_augment={policy}.*give one of timm"):
        train_transform("classification", Preprocessing(size=(32, 32)), AugmentConfig(auto_augment=policy))


def test_training_with_dali_follows_training_with_pillow(config_file, ptq, tmp_path):
    pytest.importorskip("nvidia.dali", reason="needs NVIDIA DALI: pip install 'qswin[dali]'")
    pillow, dali = (
        losses(run(config_file, f"init={ptq}", f"data.decoder={decoder}", f"run={tmp_path / decoder}")[1])
        for decoder in ("pillow", "dali")
    )
    assert pillow.keys() == dali.keys() and pillow != dali
    assert dali == pytest.approx(pillow, rel=0.02)


@pytest.mark.parametrize(
    "decoder, message", [("jpeg", "not known; choose pillow, dali"), ("dali", "is for classification")]
)
def test_a_decoder_that_a_task_has_not_is_an_error(masks_config, decoder, message):
    with pytest.raises(ValueError, match=message):
        run(masks_config, f"data.decoder={decoder}")


class Killed(BaseException):
    """Ends a run as a signal would, wherever it is."""


@pytest.mark.slow
@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_a_resumed_run_of_low_precision_ends_with_the_same_bits(config_file, ptq, tmp_path, monkeypatch, amp):
    """Killed within the second epoch; the loss's scale, which grows every third step here, goes on too."""
    options = (f"init={ptq}", "train.epochs=2", f"train.amp={amp}", "train.save_minutes=0")
    step, scales = TrainStep.__call__, set()

    def killed(self, batches):
        self.scaler.set_growth_interval(3)
        scales.add(self.scaler.get_scale())
        if limit is not None and self.done == limit:
            raise Killed
        return step(self, batches)

    monkeypatch.setattr(TrainStep, "__call__", killed)
    limit = None
    whole, expected = run(config_file, *options, f"run={tmp_path / 'whole'}")
    limit = 7
    with pytest.raises(Killed):
        run(config_file, *options, f"run={tmp_path / 'killed'}")
    limit = None
    resumed, found = run(config_file, *options, f"run={tmp_path / 'killed'}")
    assert losses(found) == losses(expected) and len(losses(found)) == 10
    assert resumed.read_bytes() == whole.read_bytes()
    first, second = (torch.load(path.parent / "last.pt")["scaler"] for path in (whole, resumed))
    assert first == second and bool(first) == (amp == "fp16")
    assert (len(scales) > 1) == (amp == "fp16")  # the scale has moved, so that a fresh one would differ


def test_torchrun_finds_the_module_inside_the_checkout():
    done = subprocess.run([sys.executable, "-m", "qat.train", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode in (0, 1) and "usage: qswin train" in done.stdout
