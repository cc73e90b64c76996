"""More hostile cases: other commands, other places for the same thing, and what only shows in a second run."""

import fcntl
import io
import json
import os
import shutil
import socket
import stat
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from benchmarks.hostile_cases import Command, case
from benchmarks.hostile_world import World

# 1. Outputs are regular files.


def _private(world: World) -> str | None:
    mode = stat.S_IMODE(world.out.stat().st_mode)
    return None if mode == 0o600 else f"its mode is {mode:o}"


@case(1, "a result where the umask is 077", code=0, umask=0o077, check=_private)
def _(world: World) -> Command:
    return world.evaluate_graph("--json", world.out)


@case(1, "a result over a link to nothing", code=0, check=lambda world: None if world.out.is_symlink() else "no link")
def _(world: World) -> Command:
    world.out.symlink_to("target.json")
    return world.evaluate_graph("--json", world.out)


@case(1, "a result over a circle of links", "out.json")
def _(world: World) -> Command:
    world.out.symlink_to("other.json")
    (world.folder / "other.json").symlink_to("out.json")
    return world.evaluate_graph("--json", world.out)


@case(1, "a result into /dev/full", "No space left")
def _(world: World) -> Command:
    return world.evaluate_graph("--json", "/dev/full")


@case(1, "a page over a folder", "report.html")
def _(world: World) -> Command:
    (world.run / "report.html").mkdir(parents=True)
    (world.run / "good.json").write_text(json.dumps({"kind": "evaluation", "acc1": 50.0, "images": 2}))
    return ["report", world.run]


# 2. A file from elsewhere chooses nothing but data.


@case(2, "a sidecar with file", "file")
def _(world: World) -> Command:
    return ["inspect", "--model", world.model(file="/etc/passwd")]


@case(2, "a config's file that reads an environment variable", "config.yaml.*not expanded")
def _(world: World) -> Command:
    world.config.write_text(world.config.read_text().replace("run: run", "run: ${oc.env:HOME}"))
    return world.calibrate()


@case(2, "a YAML that makes an object", "config.yaml")
def _(world: World) -> Command:
    world.config.write_text(world.config.read_text() + "init: !!python/object/apply:os.system ['touch pwned']\n")
    return world.calibrate()


@case(
    2, "weights that hold code", "pickled code", check=lambda world: "it ran" if (world.folder / "x").exists() else None
)
def _(world: World) -> Command:
    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (str(world.folder / "x"),))

    torch.save({"model": Payload()}, world.weights)
    return world.calibrate()


# 3. A report shows its own run.


def _report(name: str, make: Callable[[Path], object]) -> None:
    def skipped(world: World) -> str | None:
        page = (world.run / "report.html").read_text()
        return "it is in the page" if "root:x:0" in page or "<h2>Accuracy" not in page else None

    @case(3, name, code=0, check=skipped)
    def _(world: World) -> Command:
        world.run.mkdir(parents=True)
        (world.run / "good.json").write_text(json.dumps({"kind": "evaluation", "acc1": 50.0, "images": 2}))
        make(world.run)
        return ["report", world.run]


for suffix in ("log.jsonl", "histograms.npz", "ptq.safetensors", "ptq.safetensors.json"):
    _report(f"{suffix} that is a link to /etc/passwd", lambda run, name=suffix: (run / name).symlink_to("/etc/passwd"))
    _report(f"{suffix} that is a FIFO", lambda run, name=suffix: os.mkfifo(run / name))
_report("a folder of pictures that is a link to /etc", lambda run: (run / "pictures").symlink_to("/etc"))
_report("a result that is /dev/zero", lambda run: os.mknod(run / "x.json", stat.S_IFCHR | 0o666, os.makedev(1, 5)))
for kind in ("sensitivity", "timing", "comparison", "layers", "quantizers", "search", "build", "export"):
    values = {"kind": kind, "rows": [1, "a", None, {"a": []}], "layers": {"a": []}, "quantizers": 3, "versions": []}
    _report(f"a {kind} of the wrong types", lambda run, values=values: (run / "x.json").write_text(json.dumps(values)))


# 4. One job a run folder.


def _held(path: Path) -> None:
    """Takes a lock in this process, which lives as long as the command."""
    path.parent.mkdir(exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    os.write(descriptor, f"process {os.getpid()} on here".encode())


@case(4, "calibrate where another job is at work", r"run: process \d+ on here is at work there")
def _(world: World) -> Command:
    _held(world.run / ".lock")
    return world.calibrate()


@case(4, "train where another job is at work", r"run: process \d+ on here is at work there")
def _(world: World) -> Command:
    _held(world.run / ".lock")
    return world.train()


def _sensitivity(world: World) -> Command:
    return ["sensitivity", "--checkpoint", world.checkpoint, "--data", world.images / "train", "--json", world.out]


@case(4, "sensitivity where another job writes the report", r"out.json: process \d+ on here is at work there")
def _(world: World) -> Command:
    _held(world.folder / ".out.json.lock")
    return _sensitivity(world)


# 5. Everything that is read ends.


def _socket(path: Path) -> None:
    socket.socket(socket.AF_UNIX).bind(str(path))


for what, make in (("a FIFO", os.mkfifo), ("a socket", _socket)):
    for place in ("train/a/x.jpg", "train/x.tar"):

        @case(5, f"train with {what} called {Path(place).name}", Path(place).name.replace(".", "\\."))
        def _(world: World, make: Any = make, place: str = place) -> Command:
            make(world.images / place)
            return world.train("train.batch_size=1")  # which leaves no image out

    @case(5, f"a config that is {what}", "config.yaml")
    def _(world: World, make: Any = make) -> Command:
        world.config.unlink()
        make(world.config)
        return world.calibrate()

    @case(5, f"a sidecar that is {what}", "ptq.safetensors")
    def _(world: World, make: Any = make) -> Command:
        world.checkpoint.with_name("ptq.safetensors.json").unlink()
        make(world.checkpoint.with_name("ptq.safetensors.json"))
        return ["inspect", "--model", world.checkpoint]

    @case(5, f"a graph that is {what}", "fp32.onnx")
    def _(world: World, make: Any = make) -> Command:
        world.onnx.unlink()
        make(world.onnx)
        return world.evaluate_graph()


@case(5, "a sensitivity report that is a FIFO", "r.json")
def _(world: World) -> Command:
    os.mkfifo(world.folder / "r.json")
    common = ["search", "--checkpoint", world.checkpoint, "--data", world.images / "train", "--recipe", "r.yaml"]
    return [*common, "--sensitivity", "r.json", "--budget", "kl<=1"]


@case(5, "a config that is /dev/zero", "zero")
def _(world: World) -> Command:
    return ["calibrate", "--config", "/dev/zero"]


@case(5, "a config of 100 MB", "larger than")
def _(world: World) -> Command:
    world.config.write_text("#" * 100_000_000)
    return world.calibrate()


@case(5, "a YAML of 10^5 maps in each other", "64 levels")
def _(world: World) -> Command:
    (world.folder / "r.yaml").write_text("rules: " + "{a: " * 100_000)
    return world.calibrate("recipe=r.yaml")


@case(5, "a recipe of 10^5 rules, each written out", "values|larger")
def _(world: World) -> Command:
    (world.folder / "r.yaml").write_text("name: x\nrules:\n" + "- {sites: fc1}\n" * 50_000)
    return world.calibrate("recipe=r.yaml")


@case(5, "metadata of 10^5 levels", "fp32.onnx")
def _(world: World) -> Command:
    return _metadata(world, "[" * 100_000)


def _metadata(world: World, text: str) -> Command:
    graph = onnx.load(world.onnx)
    next(entry for entry in graph.metadata_props if entry.key == "qswin").value = text
    onnx.save(graph, world.onnx)
    return world.evaluate_graph()


# 6. Memory follows the output.


@case(6, "a PNG of 1,000,000 x 1", code=0, megabytes=1500)
def _(world: World) -> Command:
    Image.new("L", (1_000_000, 1)).save(world.images / "val" / "a" / "long.png")
    return world.evaluate()


@case(6, "a shard's label of 20 GB", "x.tar")
def _(world: World) -> Command:
    shutil.rmtree(world.images / "val")
    (world.images / "val").mkdir()
    with (world.images / "val" / "x.tar").open("wb") as file:
        (info := tarfile.TarInfo("n0.cls")).size = 20 << 30
        file.write(info.tobuf())
        file.truncate((20 << 30) + 2048)
    return world.evaluate()


@case(6, "weights that are a zip of 2 GB in 2 MB", "compressed")
def _(world: World) -> Command:
    with zipfile.ZipFile(world.weights, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("a/data/0", "w") as member:
        for _ in range(400):
            member.write(bytes(5 << 20))
    return world.calibrate()


for name, value in (("window_size", 10**6), ("patch_size", 10**6), ("num_heads", [10**6, 1]), ("embed_dim", 10**30)):

    @case(6, f"a sidecar with {name} {value:.0e}" if name != "num_heads" else f"a sidecar with {name} {value}", name)
    def _(world: World, name: str = name, value: Any = value) -> Command:
        return ["inspect", "--model", world.model(**{name: value})]


@case(6, "a sidecar with images of 10^6 pixels a side", "preprocessing.size")
def _(world: World) -> Command:
    return ["inspect", "--model", world.sidecar(preprocessing={"size": [10**6, 10**6]})]


@case(6, "a sidecar beyond the limits, doubled", "16384", environment={"QSWIN_LIMITS": "2"})
def _(world: World) -> Command:
    return ["inspect", "--model", world.model(img_size=10**6)]


@case(6, "limits that are not a number", "QSWIN_LIMITS", environment={"QSWIN_LIMITS": "abc"})
def _(world: World) -> Command:
    return world.evaluate()


def _before(world: World, nodes: list[Any], **constants: Any) -> None:
    """Nodes between the graph's input and what reads it; they make "changed" of "input"."""
    graph = onnx.load(world.onnx)
    for node in graph.graph.node:
        node.input[:] = ["changed" if name == "input" else name for name in node.input]
    for node in reversed(nodes):
        graph.graph.node.insert(0, node)
    graph.graph.initializer.extend(numpy_helper.from_array(np.asarray(v), name) for name, v in constants.items())
    onnx.save(graph, world.onnx)


def _huge(world: World, values: int) -> Command:
    sum_of_ = helper.make_node("ReduceSum", ["input"], ["x_one"], keepdims=0)
    many = helper.make_node("Expand", ["x_one", "x_shape"], ["x_many"])
    again = helper.make_node("ReduceMean", ["x_many"], ["x_mean"], keepdims=0)
    _before(world, [sum_of_, many, again, helper.make_node("Add", ["input", "x_mean"], ["changed"])], x_shape=[values])
    return world.evaluate_graph()


@case(6, "a graph that makes a tensor of 10^12 values", "memory that is free", megabytes=1000)
def _(world: World) -> Command:
    return _huge(world, 10**12)


@case(6, "a graph that makes a tensor of 2 * 10^9 values", "memory that is free", megabytes=1000)
def _(world: World) -> Command:
    return _huge(world, 2 * 10**9)


# 7. One line, exit code 2.


@case(7, "weights with a nested tensor", "weights.pth")
def _(world: World) -> Command:
    world.state(**{"head.fc.bias": torch.nested.nested_tensor([torch.ones(1), torch.ones(2)])})
    return world.calibrate()


for command in ("calibrate", "train"):

    @case(7, f"{command} with 1,500 unreadable images, skipped", code=0)
    def _(world: World, command: str = command) -> Command:
        for index in range(1500):
            (world.images / "train" / "a" / f"bad{index}.png").write_bytes(b"no image")
        settings = ("data.skip_unreadable=true", "calibration.images=1000", "train.batch_size=100")
        return world.calibrate(*settings) if command == "calibrate" else world.train(*settings)


@case(7, "last.pt of another shape", "last.pt")
def _(world: World) -> Command:
    world.last(model=lambda state: {name: torch.zeros(3) for name in state})
    return world.train("train.epochs=2")


for what, recipe in {
    "a list": "[1]",
    "a number as rules": "{name: x, rules: 3}",
    "a range of text": "{name: x, rules: [{sites: fc1, amax: abc}]}",
    "an unknown key": "{name: x, rules: [], evil: 1}",
    "a negative range": "{name: x, rules: [{sites: fc1}], dead_range: -1}",
}.items():

    @case(7, f"a recipe with {what}", "r.yaml")
    def _(world: World, recipe: str = recipe) -> Command:
        (world.folder / "r.yaml").write_text(recipe)
        return world.calibrate("recipe=r.yaml")


def _gather(world: World) -> None:
    """A graph that loads, and fails when it is run."""
    picked = helper.make_node("Gather", ["input", "x_index"], ["x_row"])
    _before(world, [picked, helper.make_node("Add", ["input", "x_row"], ["changed"])], x_index=99)


for name, command in {
    "evaluate": ["evaluate", "--model", "fp32.onnx", "--data", "images/val"],
    "bench": ["bench", "--model", "fp32.onnx", "--batch-sizes", 1],
    "compare": ["compare", "--model", "fp32.onnx", "--reference", "int8.onnx", "--images", 1],
    "calib-cache": ["calib-cache", "--onnx", "fp32.onnx", "--data", "images/train", "--cache", "x.cache", "--offline"],
}.items():

    @case(7, f"{name} of a graph that fails when it is run", "fp32.onnx: ONNX Runtime cannot run it")
    def _(world: World, command: Command = command) -> Command:
        _gather(world)
        return command

    @case(7, f"{name} of a graph of an operator that is not there", "fp32.onnx")
    def _(world: World, command: Command = command) -> Command:
        _before(world, [helper.make_node("Evil", ["input"], ["changed"])])
        return command


for setting in (
    *("train.epochs=1000000000000", "data.workers=1000000", "seed=1e400", "train.weight_decay=.nan"),
    *("model.num_classes=1000000000000", "train.augment.rotate=1e9", "calibration.images=-1", "device=tpu"),
    *("model.name=../../etc/passwd", "train.clip_grad=-1", "data.decoder=evil", "data.preprocessing={evil: 1}"),
):

    @case(7, f"a config with {setting}", setting.partition("=")[0].rpartition(".")[2])
    def _(world: World, setting: str = setting) -> Command:
        return world.train(setting)


for flags in (("--workers", "1000000"), ("--threads", "100000"), ("--timeout", "1e300"), ("--images", "9" * 5000)):

    @case(7, f"evaluate {flags[0]} {flags[1][:12]}", flags[0])
    def _(world: World, flags: tuple[str, str] = flags) -> Command:
        return world.evaluate_graph(*flags)


@case(7, "a Ctrl-C while ranges are found", code=130, interrupt=10)
def _(world: World) -> Command:
    for index in range(3000):
        shutil.copy(world.images / "train/a/0.png", world.images / f"train/a/more{index}.png")
    return world.calibrate("calibration.images=3000", "calibration.batch_size=1", "calibration.reconstruct_steps=10000")


# 8. Nothing odd passes silently.


@case(8, "a JSON key twice", "twice")
def _(world: World) -> Command:
    file = world.checkpoint.with_name("ptq.safetensors.json")
    file.write_text(file.read_text().rstrip().removesuffix("}") + ', "kind": "checkpoint"}')
    return ["inspect", "--model", world.checkpoint]


for what, preprocessing in {
    "std 0": {"std": [0, 1, 1]},
    "a negative std": {"std": [-1, 1, 1]},
    "a mean that is infinite": {"mean": [1e999, 0, 0]},
    "crop_pct 0": {"crop_pct": 0},
}.items():

    @case(8, f"a sidecar with {what}", "preprocessing")
    def _(world: World, preprocessing: dict[str, Any] = preprocessing) -> Command:
        return ["inspect", "--model", world.sidecar(preprocessing=preprocessing)]


@case(8, "training that goes on with images swapped", "changed since training began")
def _(world: World) -> Command:
    world.first(world.train())
    (world.images / "train/a/0.png").rename(world.images / "train/b/swapped.png")
    return world.train("train.epochs=2")


@case(8, "training that goes on with half of the images", "changed since training began")
def _(world: World) -> Command:
    world.first(world.train())
    for name in ("a", "b"):
        (world.images / f"train/{name}/0.png").unlink()
    return world.train("train.epochs=2")


@case(8, "last.pt whose step is beyond the config's", "last.pt: its step is 1000000")
def _(world: World) -> Command:
    world.last(step=lambda step: 1_000_000)
    return world.train("train.epochs=2")


def _faster(optimizer: dict[str, Any]) -> dict[str, Any]:
    optimizer["param_groups"][0]["base_lr"] = 1e6
    return optimizer


@case(8, "last.pt whose learning rate is not the config's", "last.pt: its optimizer has base_lr")
def _(world: World) -> Command:
    world.last(optimizer=_faster)
    return world.train("train.epochs=2")


@case(8, "last.pt that does not say which images it is of", "last.pt")
def _(world: World) -> Command:
    world.last(data=lambda data: None)
    return world.train("train.epochs=2")


# 9. Messages are safe and name the file.


@case(9, "a member of a shard whose name steers the terminal", r"\\x1b")
def _(world: World) -> Command:
    with tarfile.open(world.images / "val" / "x.tar", "w") as tar:
        for name in ("\x1b[2J.png", "\x1b[2J.cls"):
            (info := tarfile.TarInfo(name)).size = 1
            tar.addfile(info, io.BytesIO(b"0"))
    for name in ("a", "b"):
        shutil.rmtree(world.images / "val" / name)
    return world.evaluate()


@case(9, "a class whose name steers the terminal", r"\\x1b")
def _(world: World) -> Command:
    (world.images / "val" / "a").rename(world.images / "val" / "\x1b[2J")
    return world.evaluate()


@case(9, "a tensor whose name steers the terminal", r"\\x1b")
def _(world: World) -> Command:
    world.state(**{"\x1b[2J": torch.ones(1)})
    return world.calibrate()


@case(9, "a node whose name steers the terminal", code=0)
def _(world: World) -> Command:
    graph = onnx.load(world.onnx)
    for node in graph.graph.node:
        node.name = f"\x1b[2J\n{node.name}"
    onnx.save(graph, world.onnx)
    return ["inspect", "--model", world.onnx]


for name, value in (("img_size", [32]), ("img_size", [32, 32, 32]), ("window_size", []), ("num_heads", [])):

    @case(9, f"a sidecar with {name} {value}", "ptq.safetensors")
    def _(world: World, name: str = name, value: Any = value) -> Command:
        return ["inspect", "--model", world.model(**{name: value})]


@case(9, "a 32-bit TIFF", "deep.tif.*32-bit")
def _(world: World) -> Command:
    Image.fromarray(np.zeros((32, 32), np.int32)).save(world.images / "val" / "a" / "deep.tif")
    return world.evaluate()


def _loop(world: World) -> None:
    value = helper.make_tensor_value_info
    inputs = [value("i", TensorProto.INT64, []), value("c", TensorProto.BOOL, []), value("v", TensorProto.FLOAT, None)]
    outputs = [value("c2", TensorProto.BOOL, []), value("v2", TensorProto.FLOAT, None)]
    nodes = [helper.make_node("Identity", ["c"], ["c2"]), helper.make_node("Identity", ["v"], ["v2"])]
    body = helper.make_graph(nodes, "body", inputs, outputs)
    loop = helper.make_node("Loop", ["x_most", "x_on", "input"], ["changed"], body=body)
    _before(world, [loop], x_most=2**62, x_on=True)


for name, command in {
    "bench": ["bench", "--model", "fp32.onnx", "--batch-sizes", 1],
    "compare": ["compare", "--model", "fp32.onnx", "--reference", "int8.onnx", "--images", 1, "--layers"],
    "calib-cache": ["calib-cache", "--onnx", "fp32.onnx", "--data", "images/train", "--cache", "x.cache", "--offline"],
}.items():

    @case(9, f"{name} of a graph that never ends", "longer than 5 s")
    def _(world: World, command: Command = command) -> Command:
        _loop(world)
        return [*command, "--timeout", 5]


@case(9, "a graph whose loading never ends", "to load it took longer than 5 s")
def _(world: World) -> Command:
    nodes = [
        helper.make_node("Tile", ["x_one", "x_repeats"], ["x_a"]),
        helper.make_node("MatMul", ["x_a", "x_a"], ["x_b"]),
        helper.make_node("ReduceMean", ["x_b"], ["x_c"], keepdims=0),
        helper.make_node("Add", ["input", "x_c"], ["changed"]),
    ]
    _before(world, nodes, x_one=np.ones((1, 1), np.float32), x_repeats=[10_000, 10_000])
    return world.evaluate_graph("--timeout", 5)
