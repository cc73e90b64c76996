"""The hostile cases, by the rule of SECURITY.md that each tries."""

import base64
import dataclasses
import io
import json
import os
import shutil
import stat
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import yaml
from onnx import TensorProto, helper
from PIL import Image

from benchmarks.hostile_world import World

Command = list[Any]
Prepare = Callable[[World], Command]


@dataclasses.dataclass(frozen=True)
class Case:
    """A hostile input, the command that meets it, and what must come of it.

    Args:
        prepare: makes it in a folder, and gives the command.
        code: the exit code; 2 is a refusal in one line.
        words: a regular expression that standard error must match.
        check: what is wrong afterwards; None or "" where nothing is.
        interrupt: seconds after which the command gets a Ctrl-C.
        closed: without a standard error to write to.
        environment: variables that are set.
        umask: of the command.
    """

    rule: int
    name: str
    prepare: Prepare
    code: int = 2
    words: str = ""
    seconds: float = 90
    megabytes: int = 1500
    check: Callable[[World], str | None] | None = None
    interrupt: float | None = None
    closed: bool = False
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    umask: int = 0o022


CASES: list[Case] = []


def case(rule: int, name: str, words: str = "", **settings: Any) -> Callable[[Prepare], Prepare]:
    """Adds a case, whose `prepare` is what is decorated."""

    def add(prepare: Prepare) -> Prepare:
        CASES.append(Case(rule, name, prepare, words=words, **settings))
        return prepare

    return add


# 1. Outputs are regular files, or what stands there stays what it is.


def _still_a_device(world: World) -> str | None:
    return None if stat.S_ISCHR((world.folder / "null").stat().st_mode) else "the device is gone"


@case(1, "--json into a device", code=0, check=_still_a_device)
def _(world: World) -> Command:
    os.mknod(world.folder / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    return world.evaluate("--json", world.folder / "null")


def _link_followed(world: World) -> str | None:
    file, target = world.folder / "link.json", world.folder / "target.json"
    return None if file.is_symlink() and json.loads(target.read_text()) else "the link was replaced"


@case(1, "--json through a symbolic link", code=0, check=_link_followed)
def _(world: World) -> Command:
    (world.folder / "target.json").write_text('{"kind": "evaluation"}')
    (world.folder / "link.json").symlink_to("target.json")
    return world.evaluate("--json", world.folder / "link.json")


def _no_stale_files(world: World) -> str | None:
    left = list(world.run.glob(".last.pt.*"))
    return f"{left[0].name} is left" if left else None


@case(1, "what a killed job left half written", code=0, check=_no_stale_files)
def _(world: World) -> Command:
    world.run.mkdir()
    (world.run / ".last.pt.a1b2c3d4").write_bytes(b"half")
    return world.train("run=run")


@case(1, "a result over a checkpoint", "ptq.safetensors")
def _(world: World) -> Command:
    return world.evaluate("--json", world.checkpoint)


@case(1, "a result into a folder that is not there and cannot be made")
def _(world: World) -> Command:
    (world.folder / "file").write_text("")
    return world.evaluate("--json", world.folder / "file" / "out.json")


# 2. A file from elsewhere chooses nothing but data.


def _setting(name: str, value: Any) -> None:
    @case(2, f"a sidecar with {name}", name)
    def _(world: World) -> Command:
        return ["inspect", "--model", world.model(**{name: value})]


@case(2, "a sidecar with pretrained, which is not looked at", code=0)
def _(world: World) -> Command:
    return ["inspect", "--model", world.model(pretrained=True)]


_setting("pretrained_cfg", {"url": "http://127.0.0.1:9/x.pth"})
_setting("pretrained_cfg_overlay", {"file": "/etc/passwd"})
_setting("checkpoint_path", "/etc/passwd")
_setting("device", "meta")
_setting("cache_dir", "/tmp/x")


@case(2, "a config that reads an environment variable", "oc.env|\\$\\{")
def _(world: World) -> Command:
    return world.calibrate("run=${oc.env:HOME}")


@case(2, "a config with pretrained_cfg", "pretrained_cfg")
def _(world: World) -> Command:
    return world.calibrate("model.kwargs.pretrained_cfg={url: 'http://127.0.0.1:9/x'}")


@case(2, "a flag that reads a file", "flagfile")
def _(world: World) -> Command:
    return ["train", "--config", world.config, "--flagfile=/etc/passwd"]


# 3. A report shows its own run.


def _report(name: str, make: Callable[[Path], None], check: Callable[[str], str | None], **settings: Any) -> None:
    @case(3, name, code=0, check=lambda world: check((world.run / "report.html").read_text()), **settings)
    def _(world: World) -> Command:
        (world.run / "pictures").mkdir(parents=True)
        make(world.run)
        (world.run / "good.json").write_text(json.dumps({"kind": "evaluation", "acc1": 50.0, "images": 2}))
        return ["report", world.run]


def _without_secret(page: str) -> str | None:
    secret = Path("/etc/passwd").read_bytes()
    found = base64.b64encode(secret).decode()[:40] in page or secret.decode()[:20] in page
    return "the file is in the page" if found else None


def _endless(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(20 << 30)


_report(
    "a picture that is a link to /etc/passwd",
    lambda run: (run / "pictures/s.png").symlink_to("/etc/passwd"),
    _without_secret,
)
_report(
    "a result that is a link to /etc/passwd", lambda run: (run / "s.json").symlink_to("/etc/passwd"), _without_secret
)
_report(
    "a picture that is a script",
    lambda run: _write(run / "pictures/s.png", "<script>alert(1)</script>"),
    lambda page: "a script" if "alert(1)" in page or base64.b64encode(b"<script>alert").decode()[:12] in page else None,
)
_report("a result that is a FIFO", lambda run: os.mkfifo(run / "x.json"), lambda page: None)
_report("a picture that is a FIFO", lambda run: os.mkfifo(run / "pictures/x.png"), lambda page: None)
_report("a result of 20 GB", lambda run: _endless(run / "x.json"), lambda page: None)
_report("a picture of 20 GB", lambda run: _endless(run / "pictures/x.png"), lambda page: None)
_report("a foreign JSON with rows", lambda run: _write(run / "x.json", '{"rows": [1, "a", null]}'), lambda page: None)
_report(
    "a result of the wrong types",
    lambda run: _write(run / "x.json", '{"kind": "evaluation", "acc1": {"a": []}}'),
    lambda page: None,
)
_report(
    "a name with a script",
    lambda run: _write(run / "<script>alert(1)<>.json", '{"kind": "evaluation"}'),
    lambda page: "a script" if "<script>alert(1)" in page else None,
)


def _write(path: Path, text: str) -> None:
    path.write_text(text)


# 5. Everything that is read ends.


@case(5, "an image that is a FIFO")
def _(world: World) -> Command:
    os.mkfifo(world.images / "val" / "a" / "x.jpg")
    return world.evaluate()


@case(5, "an image that is a FIFO, where unreadable ones are skipped", code=0)
def _(world: World) -> Command:
    os.mkfifo(world.images / "val" / "a" / "x.jpg")
    return world.evaluate("--skip-unreadable")


@case(5, "a shard that is a FIFO")
def _(world: World) -> Command:
    os.mkfifo(world.images / "val" / "x.tar")
    return world.evaluate()


@case(5, "a model that is a FIFO")
def _(world: World) -> Command:
    os.mkfifo(world.folder / "x.safetensors")
    return ["inspect", "--model", world.folder / "x.safetensors"]


@case(5, "weights that hold themselves")
def _(world: World) -> Command:
    state: dict[str, Any] = {}
    state["model"] = state
    torch.save(state, world.weights)
    return world.calibrate()


@case(5, "a YAML alias bomb")
def _(world: World) -> Command:
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    lines += [f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True)]
    world.config.write_text(world.config.read_text() + "\n".join(lines) + "\n")
    return world.calibrate()


@case(5, "a YAML that holds itself")
def _(world: World) -> Command:
    world.config.write_text(world.config.read_text() + "data: &d\n  root: *d\n")
    return world.calibrate()


@case(5, "a YAML of 10^5 levels")
def _(world: World) -> Command:
    (world.folder / "r.yaml").write_text("rules: " + "[" * 100_000)
    return world.calibrate(f"recipe={world.folder / 'r.yaml'}")


@case(5, "a sidecar of 10^5 levels")
def _(world: World) -> Command:
    world.checkpoint.with_name("ptq.safetensors.json").write_text('{"a":' * 100_000 + "1" + "}" * 100_000)
    return ["inspect", "--model", world.checkpoint]


@case(5, "a recipe of 10^5 rules")
def _(world: World) -> Command:
    rules = [{"sites": "fc1", "quantize": True}] * 100_000
    (world.folder / "r.yaml").write_text(yaml.safe_dump({"name": "mine", "rules": rules}))
    return world.calibrate(f"recipe={world.folder / 'r.yaml'}")


@case(5, "an override of exponential time", code=2)
def _(world: World) -> Command:
    graph = onnx.load(world.onnx)
    graph.graph.node[0].name = "a" * 60 + "!"
    onnx.save(graph, world.onnx)
    engine = world.folder / "x.engine"
    return ["build", "--onnx", world.onnx, "--engine", engine, "--target", "tensorrt-rtx", "--override", "(a+)+$=fp32"]


# 6. Memory follows the output, not the input.


@case(6, "a PNG of 1 x 1,000,000", code=0, words="", megabytes=1000)
def _(world: World) -> Command:
    Image.new("L", (1, 1_000_000)).save(world.images / "val" / "a" / "long.png")
    return world.evaluate()


@case(6, "a PNG of 60,000 x 60,000", megabytes=1000)
def _(world: World) -> Command:
    header = b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", (60_000).to_bytes(4, "big") * 2 + b"\x08\x02\x00\x00\x00")
    (world.images / "val" / "a" / "big.png").write_bytes(header + _chunk(b"IDAT", b"") + _chunk(b"IEND", b""))
    return world.evaluate()


def _chunk(kind: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


@case(6, "a shard's label of 999999999", megabytes=1000)
def _(world: World) -> Command:
    png = (world.images / "val" / "a" / "0.png").read_bytes()
    shutil.rmtree(world.images / "val")
    (world.images / "val").mkdir()
    with tarfile.open(world.images / "val" / "x.tar", "w") as tar:
        for name, data in (("n0.png", png), ("n0.cls", b"999999999")):
            (info := tarfile.TarInfo(name)).size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return world.evaluate()


@case(6, "an expanded tensor of 10^12 elements")
def _(world: World) -> Command:
    return _weights(world, "head.fc.weight", torch.zeros(1, dtype=torch.half).expand(10**6, 10**6))


def _size(name: str, value: Any) -> None:
    @case(6, f"a sidecar with {name} {value}", name, megabytes=1000)
    def _(world: World) -> Command:
        return ["inspect", "--model", world.model(**{name: value})]


_size("img_size", 10**6)
_size("embed_dim", 10**9)
_size("num_classes", 10**12)
_size("depths", [10**9, 1])


# 7. One line, exit code 2.


def _weights(world: World, name: str, value: Any) -> Command:
    world.state(**{name: value})
    return world.calibrate()


def _tensor(what: str, make: Callable[[], Any], rule: int = 7) -> None:
    @case(rule, f"weights with {what}", "head.fc.bias")
    def _(world: World) -> Command:
        return _weights(world, "head.fc.bias", make())


_tensor("a meta tensor", lambda: torch.empty(2, device="meta"))
_tensor("a sparse tensor", lambda: torch.ones(2).to_sparse())
_tensor("a quantized tensor", lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8))
_tensor("a number", lambda: 3)
_tensor("complex numbers", lambda: torch.ones(2, dtype=torch.complex64), 8)
_tensor("1e300", lambda: torch.full((2,), 1e300, dtype=torch.double), 8)
_tensor("NaN", lambda: torch.full((2,), float("nan")), 8)
_tensor("infinity", lambda: torch.full((2,), float("inf")), 8)


@case(7, "1,500 unreadable images, skipped", code=0)
def _(world: World) -> Command:
    for index in range(1500):
        (world.images / "val" / "a" / f"bad{index}.png").write_bytes(b"no image")
    return world.evaluate("--skip-unreadable")


def _last(name: str, value: Any) -> None:
    @case(7, f"last.pt is {name}", "last.pt")
    def _(world: World) -> Command:
        world.run.mkdir()
        torch.save(value, world.run / "last.pt")
        return world.train()


_last("a list", [1, 2])
_last("an empty dictionary", {})
_last("of wrong types", {"step": "x", "model": 1, "optimizer": None})


def _sidecar(what: str, **changes: Any) -> None:
    @case(7, f"a sidecar whose {what}", "ptq.safetensors")
    def _(world: World) -> Command:
        return ["inspect", "--model", world.sidecar(**changes)]


_sidecar("recipe is a number", recipe=3)
_sidecar("recipe's rules are text", recipe={"name": "gemm", "rules": "fc1"})
_sidecar("model is a list", model=[1])
_sidecar("name is a number", model={"name": 3})
_sidecar("classes are numbers", classes=[1, 2])
_sidecar("size is text", preprocessing={"size": "32"})
_sidecar("stage is a list", stage=[])
_sidecar("metrics are text", metrics="x")


def _setting_of_config(rule: int, setting: str, words: str, command: str = "train", code: int = 2) -> None:
    @case(rule, f"{command} {setting}", words, code=code)
    def _(world: World) -> Command:
        return world.train(setting) if command == "train" else world.calibrate(setting)


for key, value in {
    "train.batch_size": 0,
    "train.lr": 0,
    "train.augment.mixup": ".nan",
    "train.augment.auto_augment": "evil",
    "train.workers": -1,
}.items():
    _setting_of_config(7, f"{key}={value}", key.rpartition(".")[2])
_setting_of_config(7, "model.kwargs.img_size=33", "", "calibrate", code=0)  # 8 x 8 patches of 4
_setting_of_config(7, "device=meta", "meta", "calibrate")
_setting_of_config(7, "calibration.batch_size=0", "batch_size", "calibrate")
_setting_of_config(8, "train.lr=-1", "lr")
_setting_of_config(8, "train.ema_decay=2", "ema_decay")
_setting_of_config(8, "train.augment.scale=[1,0]", "scale")
_setting_of_config(8, "data.preprocessing.std=[0,1,1]", "std", "calibrate")


def _graph(what: str, make: Callable[[], onnx.ModelProto], listed: bool = False) -> None:
    """To be listed, to be built from and to be run; `inspect` lists what is no model of this project's too."""
    for command in ("inspect", "build", "evaluate"):
        code = 0 if listed and command == "inspect" else 2

        @case(7, f"{command} of an ONNX graph {what}", "x.onnx" if code else "", code=code)
        def _(world: World, command: str = command) -> Command:
            onnx.save(make(), world.folder / "x.onnx")
            if command == "inspect":
                return ["inspect", "--model", world.folder / "x.onnx"]
            if command == "build":
                engine = world.folder / "x.engine"
                return ["build", "--onnx", world.folder / "x.onnx", "--engine", engine, "--target", "tensorrt-rtx"]
            return ["evaluate", "--model", world.folder / "x.onnx", "--data", world.images / "val"]


def _model(
    inputs: list[Any], nodes: list[Any], outputs: list[Any], weights: list[Any] | None = None
) -> onnx.ModelProto:
    graph = helper.make_graph(nodes, "g", inputs, outputs, weights or [])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def _scalar() -> onnx.ModelProto:
    value = helper.make_tensor_value_info("input", TensorProto.FLOAT, [])
    return _model(
        [value],
        [helper.make_node("Neg", ["input"], ["logits"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [])],
    )


def _without_inputs() -> onnx.ModelProto:
    node = helper.make_node("Constant", [], ["logits"], value_float=1.0)
    return _model([], [node], [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [])])


def _half() -> onnx.ModelProto:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT16, [1, 3, 32, 32]) for name in ("input", "logits")]
    return _model(values[:1], [helper.make_node("Neg", ["input"], ["logits"])], values[1:])


def _sequence() -> onnx.ModelProto:
    value = helper.make_tensor_sequence_value_info("input", TensorProto.FLOAT, None)
    node = helper.make_node("ConcatFromSequence", ["input"], ["logits"], axis=0)
    return _model([value], [node], [helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)])


def _external() -> onnx.ModelProto:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[3], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", "../../../etc/passwd"), ("offset", "0"), ("length", "12")):
        tensor.external_data.add(key=key, value=value)
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [3]) for name in ("input", "logits")]
    return _model(values[:1], [helper.make_node("Add", ["input", "w"], ["logits"])], values[1:], [tensor])


_graph("without inputs", _without_inputs, listed=True)
_graph("with a float16 input", _half, listed=True)
_graph("with a scalar input", _scalar, listed=True)
_graph("with a sequence as input", _sequence, listed=True)
_graph("whose weights are in /etc/passwd", _external)


@case(7, "metadata of the wrong types", "fp32.onnx")
def _(world: World) -> Command:
    graph = onnx.load(world.onnx)
    for entry in graph.metadata_props:
        if entry.key == "qswin":
            entry.value = json.dumps({"task": 3, "preprocessing": [], "classes": "ab"})
    onnx.save(graph, world.onnx)
    return ["evaluate", "--model", world.onnx, "--data", world.images / "val"]


@case(7, "a Ctrl-C while training", code=130, interrupt=12)
def _(world: World) -> Command:
    return world.train("train.epochs=100000")


@case(7, "a closed standard error", closed=True)
def _(world: World) -> Command:
    return ["inspect", "--model", world.folder / "missing.safetensors"]


# 8. Nothing odd passes silently.


@case(8, "weights with module.X beside X", "module")
def _(world: World) -> Command:
    return _weights(world, "module.head.fc.bias", torch.ones(2))


@case(8, "a YAML key twice", "twice|duplicate|again")
def _(world: World) -> Command:
    world.config.write_text(world.config.read_text() + "recipe: full\n")
    return world.calibrate()


@case(8, "export --opset 99", "opset")
def _(world: World) -> Command:
    return ["export", "--checkpoint", world.checkpoint, "--onnx", world.folder / "x.onnx", "--opset", 99]


@case(8, "weights changed under their checksum", "checksum|changed|not the one")
def _(world: World) -> Command:
    data = bytearray(world.checkpoint.read_bytes())
    data[-1] ^= 1
    world.checkpoint.write_bytes(data)
    return ["inspect", "--model", world.checkpoint]


# 9. Messages are safe and name the file.


@case(9, "an image whose name steers the terminal", "\\\\x1b|\\\\033")
def _(world: World) -> Command:
    (world.images / "val" / "a" / "\x1b[2J\x1b]0;x\x07.png").write_bytes(b"no image")
    return world.evaluate()


@case(9, "an image whose name has a newline")
def _(world: World) -> Command:
    (world.images / "val" / "a" / "x\nI1124 fine.png").write_bytes(b"no image")
    return world.evaluate()


@case(9, "a 16-bit PGM", code=0)
def _(world: World) -> Command:
    (world.images / "val" / "a" / "deep.pgm").write_bytes(b"P5 32 32 65535\n" + bytes(2 * 32 * 32))
    return world.evaluate()


@case(9, "a graph that never ends", seconds=90)
def _(world: World) -> Command:
    graph = onnx.load(world.onnx)
    true, most = helper.make_tensor("on", TensorProto.BOOL, [], [True]), np.iinfo(np.int64).max
    body = helper.make_graph(
        [helper.make_node("Identity", ["c"], ["c2"]), helper.make_node("Identity", ["v"], ["v2"])],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("c", TensorProto.BOOL, []),
            helper.make_tensor_value_info("v", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("c2", TensorProto.BOOL, []),
            helper.make_tensor_value_info("v2", TensorProto.FLOAT, None),
        ],
    )
    graph.graph.initializer.extend([true, helper.make_tensor("most", TensorProto.INT64, [], [most])])
    for node in graph.graph.node:
        for index, name in enumerate(node.input):
            if name == "input":
                node.input[index] = "looped"
    graph.graph.node.insert(0, helper.make_node("Loop", ["most", "on", "input"], ["looped"], body=body))
    onnx.save(graph, world.onnx)
    return ["evaluate", "--model", world.onnx, "--data", world.images / "val", "--timeout", 10]
