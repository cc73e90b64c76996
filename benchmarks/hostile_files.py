"""Hostile cases of size and kind: files of 20 GB, what search and sensitivity read, and flags beyond all bounds."""

import io
import json
import os
import shutil
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.hostile_cases import Command, case
from benchmarks.hostile_world import World

HUGE = 20 << 30


def _huge(path: Path, begin: bytes = b"") -> None:
    """A file of 20 GB that takes no space."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(begin)
        file.truncate(HUGE)


def _shard(world: World, **members: bytes) -> Path:
    """The validation images as one shard, of these members."""
    shutil.rmtree(world.images / "val")
    (world.images / "val").mkdir()
    with tarfile.open(world.images / "val" / "x.tar", "w") as tar:
        for name, data in members.items():
            (info := tarfile.TarInfo(name.replace("_", "."))).size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return world.images / "val"


# 1. Outputs are regular files.


@case(1, "pictures into a file", "pictures.*not saved")
def _(world: World) -> Command:
    (world.folder / "pictures").touch()
    return world.evaluate_graph("--pictures", world.folder / "pictures")


@case(1, "a graph over a folder", "x.onnx: not saved")
def _(world: World) -> Command:
    (world.folder / "x.onnx").mkdir()
    return ["export", "--checkpoint", world.checkpoint, "--onnx", world.folder / "x.onnx"]


@case(1, "a plot into /dev/full", "full.*: not saved")
def _(world: World) -> Command:
    (world.folder / "full.png").symlink_to("/dev/full")
    return ["bench", "--model", world.onnx, "--batch-sizes", 1, "--plot", world.folder / "full.png"]


@case(1, "a result into a folder below a file, of build", "x.engine.*: not saved")
def _(world: World) -> Command:
    (world.folder / "file").touch()
    engine = world.folder / "file" / "deep" / "x.engine"
    return ["build", "--onnx", world.folder / "int8.onnx", "--engine", engine, "--target", "tensorrt-rtx"]


# 2. A file from elsewhere chooses nothing but data, and nothing leaves the machine.


@case(
    2,
    "a graph, run where ONNX Runtime would keep what it sends",
    code=0,
    environment={"XDG_CACHE_HOME": "cache", "HOME": "home"},
    check=lambda world: "it keeps an identifier" if list(world.folder.glob("*/Microsoft")) else None,
)
def _(world: World) -> Command:
    return world.evaluate_graph()


# 5. Everything that is read ends.


@case(5, "class names in a FIFO", code=0)
def _(world: World) -> Command:
    _shard(world, n0_png=(world.images / "val/a/0.png").read_bytes(), n0_cls=b"0")
    os.mkfifo(world.images / "classes.txt")
    return world.evaluate()


@case(5, "a folder of images that leads into itself", code=0)
def _(world: World) -> Command:
    (world.images / "val/a/again").symlink_to(world.images / "val")
    return world.evaluate()


@case(5, "weights to look at that are a FIFO", "x.pth")
def _(world: World) -> Command:
    os.mkfifo(world.folder / "x.pth")
    return ["init", world.folder / "x.pth"]


# 6. Memory follows the output.


@case(6, "a graph of 20 GB", "fp32.onnx: larger than", megabytes=700)
def _(world: World) -> Command:
    _huge(world.onnx)
    return world.evaluate_graph()


@case(6, "a graph of 20 GB to build from", "fp32.onnx: larger than", megabytes=700)
def _(world: World) -> Command:
    _huge(world.onnx)
    return ["build", "--onnx", world.onnx, "--engine", world.folder / "x.engine", "--target", "tensorrt-rtx"]


@case(6, "class names of 20 GB", "classes.txt: larger than", megabytes=1000)
def _(world: World) -> Command:
    _shard(world, n0_png=(world.images / "val/a/0.png").read_bytes(), n0_cls=b"0")
    _huge(world.images / "classes.txt")
    return world.evaluate()


@case(6, "a shard's image of 20 GB", "x.tar: n0.png is larger than", megabytes=1000)
def _(world: World) -> Command:
    folder = _shard(world, n0_cls=b"0")
    data = (folder / "x.tar").read_bytes()[:1024]  # the label, without the end of the archive
    (info := tarfile.TarInfo("n0.png")).size = HUGE
    with (folder / "x.tar").open("wb") as file:
        file.write(data + info.tobuf())
        file.truncate(len(data) + 512 + HUGE + 1024)
    return world.evaluate()


@case(6, "an image of 20 GB", "big.jpg", megabytes=1000)
def _(world: World) -> Command:
    _huge(world.images / "val/a/big.jpg", b"\xff\xd8\xff\xe0")
    return world.evaluate()


@case(6, "last.pt of 20 GB", "last.pt", megabytes=1000)
def _(world: World) -> Command:
    _huge(world.run / "last.pt")
    return world.train()


@case(6, "last.pt that is a zip of 2 GB in 2 MB", "last.pt", megabytes=1000)
def _(world: World) -> Command:
    """Its tensor is stored whole in torch's form, then packed."""
    world.run.mkdir()
    torch.save({"model": torch.zeros(500_000_000)}, plain := world.folder / "plain.pt")
    packed = zipfile.ZipFile(world.run / "last.pt", "w", zipfile.ZIP_DEFLATED, compresslevel=1)
    with zipfile.ZipFile(plain) as old, packed as new:
        for member in old.infolist():
            with old.open(member) as source, new.open(member.filename, "w") as target:
                shutil.copyfileobj(source, target, 1 << 20)
    plain.unlink()
    return world.train()


for command in ("bench", "compare", "export"):

    @case(6, f"{command} with batches of 10^12 images", "batch|images|memory", megabytes=1000)
    def _(world: World, command: str = command) -> Command:
        if command == "bench":
            return ["bench", "--model", world.onnx, "--batch-sizes", 10**12]
        if command == "compare":
            return ["compare", "--model", world.folder / "int8.onnx", "--reference", world.onnx, "--images", 10**12]
        return ["export", "--checkpoint", world.checkpoint, "--onnx", world.folder / "x.onnx", "--batch-size", 10**12]


# 7. One line, exit code 2.

SENSITIVITY = {
    "a list": [],
    "without rows": {"kind": "sensitivity"},
    "whose rows are text": {"kind": "sensitivity", "rows": "x"},
    "whose sites are numbers": {"kind": "sensitivity", "by": 3, "rows": [{"site": 3, "kl": "x"}], "float": []},
    "of another checkpoint": {"kind": "sensitivity", "by": "site", "checkpoint_sha256": "0" * 64, "rows": []},
}
for what, values in SENSITIVITY.items():

    @case(7, f"search of a sensitivity report {what}", "r.json")
    def _(world: World, values: Any = values) -> Command:
        (world.folder / "r.json").write_text(json.dumps(values))
        common = ["search", "--checkpoint", world.checkpoint, "--data", world.images / "train", "--recipe", "r.yaml"]
        return [*common, "--sensitivity", "r.json", "--budget", "kl<=1"]

    @case(7, f"sensitivity that goes on from a report {what}", "r.json")
    def _(world: World, values: Any = values) -> Command:
        (world.folder / "r.json").write_text(json.dumps(values))
        return ["sensitivity", "--checkpoint", world.checkpoint, "--data", world.images / "train", "--json", "r.json"]


for budget in ("kl<=nan", "evil", "acc1_drop<=1e400", "bops<=-1", "latency<=", "kl<=__import__('os')"):

    @case(7, f"search --budget {budget}", "budget")
    def _(world: World, budget: str = budget) -> Command:
        (world.folder / "r.json").write_text("{}")
        common = ["search", "--checkpoint", world.checkpoint, "--data", world.images / "train", "--recipe", "r.yaml"]
        return [*common, "--sensitivity", "r.json", "--budget", budget]


def _many(world: World, split: str) -> Path:
    """A folder whose images take longer than the command has."""
    for index in range(5000):
        shutil.copy(world.images / split / "a/0.png", world.images / split / f"a/more{index}.png")
    return world.images / split


for seconds in (1, 3, 5):

    @case(7, f"a Ctrl-C {seconds} s after evaluate began, with four processes", code=130, interrupt=seconds)
    def _(world: World) -> Command:
        return ["evaluate", "--model", world.onnx, "--data", _many(world, "val"), "--workers", 4]


@case(7, "a Ctrl-C while training with four processes", code=130, interrupt=15)
def _(world: World) -> Command:
    _many(world, "train")
    return world.train("train.epochs=1000", "data.workers=4")


@case(7, "a Ctrl-C while sites are probed", code=130, interrupt=15)
def _(world: World) -> Command:
    common = ["--checkpoint", world.checkpoint, "--data", _many(world, "train"), "--images", 5000]
    return ["sensitivity", *common, "--json", world.out]


@case(7, "a Ctrl-C while a cache is made", code=130, interrupt=4)
def _(world: World) -> Command:
    common = ["--onnx", world.onnx, "--data", _many(world, "train"), "--images", 5000]
    return ["calib-cache", *common, "--cache", world.folder / "x.cache", "--offline"]


@case(7, "class names that are not text", "classes.txt: not text")
def _(world: World) -> Command:
    _shard(world, n0_png=(world.images / "val/a/0.png").read_bytes(), n0_cls=b"0")
    (world.images / "classes.txt").write_bytes(b"a\n\xff\xfe\n")
    return world.evaluate()


for flags in (("--opset", "-1"), ("--opset", "0"), ("--batch-size", "-1")):

    @case(7, f"export {' '.join(flags)}", flags[0][2:])
    def _(world: World, flags: tuple[str, str] = flags) -> Command:
        return ["export", "--checkpoint", world.checkpoint, "--onnx", world.folder / "x.onnx", *flags]


@case(7, "a conversion of weights without ranges", "weights.pth")
def _(world: World) -> Command:
    return ["convert", "--config", world.config]


@case(7, "a report of what is not a folder", "weights.pth")
def _(world: World) -> Command:
    return ["report", world.weights]
