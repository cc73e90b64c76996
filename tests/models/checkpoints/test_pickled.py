"""Checkpoints with pickled objects beside their tensors: read, without running anything that they name."""

import argparse
import collections
import io
import os
import pickle
import random
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import timm.utils
import torch

from qswin.models.checkpoints.state_dicts import read_state
from tests.helpers import small_swin

TENSORS = {
    "half": torch.arange(6.0).reshape(2, 3).half(),
    "transposed": torch.arange(12.0).reshape(3, 4).T,
    "bfloat": torch.ones(2, dtype=torch.bfloat16),
    "double": torch.full((1, 2), 1 / 3, dtype=torch.float64),
    "count": torch.tensor(3),
    "flags": torch.tensor([True, False]),
    "empty": torch.empty(0, 3),
    "parameter": torch.nn.Parameter(torch.ones(2)),
}


@pytest.fixture
def config_class(monkeypatch):
    """yacs' CfgNode, as the original Swin's repository pickles it: a dict's subclass with attributes."""
    module = types.ModuleType("yacs.config")
    module.CfgNode = type("CfgNode", (dict,), {"__module__": "yacs.config", "__setstate__": refuse})
    monkeypatch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
    monkeypatch.setitem(sys.modules, "yacs.config", module)
    return module.CfgNode


def refuse(self, state):
    raise AssertionError("it ran")


def same(found: dict, wanted: dict) -> bool:
    kept = {key: value.float() if value.is_floating_point() else value for key, value in wanted.items()}
    return list(found) == list(kept) and all(torch.equal(found[key], value) for key, value in kept.items())


def test_what_timms_train_script_saves(tmp_path):
    model = small_swin()
    args = argparse.Namespace(model="swin", lr=1e-3, img_size=None, data_dir=Path("photos"), seen={1, 2})
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    saver = timm.utils.CheckpointSaver(model, optimizer, args, checkpoint_dir=str(tmp_path))
    saver.save_checkpoint(3, metric=np.float64(0.5))
    assert same(read_state(tmp_path / "last.pth.tar"), model.state_dict())


def test_an_original_repositorys_config(tmp_path, config_class):
    config = config_class({"MODEL": config_class({"DEPTHS": [2, 2]})})
    config.__dict__["frozen"] = True
    torch.save({"model": TENSORS, "epoch": 3, "config": config}, tmp_path / "a.pth")
    assert same(read_state(tmp_path / "a.pth"), TENSORS)


def test_every_type_and_view_is_as_torch_reads_it(tmp_path):
    base = torch.arange(20.0)
    state = {**TENSORS, "view": base[3:9].reshape(2, 3), "other view": base[::4]}
    torch.save(collections.OrderedDict(state), tmp_path / "plain.pth")
    torch.save(collections.OrderedDict(state | {"args": argparse.Namespace()}), tmp_path / "a.pth")
    assert same(read_state(tmp_path / "a.pth"), read_state(tmp_path / "plain.pth"))


class Reduces:
    """What it is pickled as: a call, and then what is done to its result."""

    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


class WithState:
    def __setstate__(self, state):
        raise AssertionError("it ran")

    def __getstate__(self):
        return {"a": 1}


class ItemsOf(dict):
    def __setitem__(self, key, value):
        raise AssertionError("it ran")


def ran(path: Path) -> list:
    return [
        Reduces(os.system, (f"touch {path}",)),
        Reduces(eval, (f"open({str(path)!r}, 'w')",)),
        Reduces(exec, (f"open({str(path)!r}, 'w')",)),
        Reduces(open, (str(path), "w")),
        Reduces(getattr, (Path("x"), "unlink")),
        Reduces(__import__, ("antigravity",)),
        Reduces(torch.hub.load_state_dict_from_url, ("http://localhost/a.pth",)),
        Reduces(argparse.Namespace, (), {"a": Reduces(os.mkdir, (str(path),))}),
        Reduces(argparse.Namespace, (), None, iter([1, 2]), iter([(Reduces(os.mkdir, (str(path),)), 1)])),
        WithState(),
        ItemsOf(a=1),
    ]


@pytest.mark.parametrize("index", range(len(ran(Path("x")))))
def test_nothing_that_a_file_names_is_run(tmp_path, index):
    value = ran(tmp_path / "ran")[index]
    torch.save({"model": TENSORS, "more": [value, {"a": value}]}, tmp_path / "a.pth")
    assert same(read_state(tmp_path / "a.pth"), TENSORS)
    torch.save({"model": value}, tmp_path / "b.pth")
    with pytest.raises(ValueError, match="b.pth: holds pickled code .*never run; save only its state dict"):
        read_state(tmp_path / "b.pth")
    assert not (tmp_path / "ran").exists()


def test_modules_are_not_imported(tmp_path):
    torch.save({"model": TENSORS, "code": Reduces(print, ())}, tmp_path / "a.pth")
    rewrite(tmp_path / "a.pth", lambda data: data.replace(b"c__builtin__\nprint\n", b"cturtledemo.clock\nmain\n"))
    assert same(read_state(tmp_path / "a.pth"), TENSORS) and "turtledemo" not in sys.modules


def rewrite(file: Path, change) -> None:
    """Changes the pickle in a file of torch.save."""
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, change(data) if name.endswith("data.pkl") else data)


def pickled(*operations: bytes) -> bytes:
    return pickle.PROTO + b"\x02" + b"".join(operations) + pickle.STOP


NAMESPACE = pickle.GLOBAL + b"argparse\nNamespace\n"
REBUILD = pickle.GLOBAL + b"torch._utils\n_rebuild_tensor_v2\n"
STORAGE = (
    pickle.MARK
    + b"".join(pickle.BINUNICODE + len(text).to_bytes(4, "little") + text for text in (b"storage",))
    + pickle.GLOBAL
    + b"torch\nFloatStorage\n"
    + b"".join(pickle.BINUNICODE + len(text).to_bytes(4, "little") + text for text in (b"0", b"cpu"))
    + pickle.BININT1
    + b"\x06"
    + pickle.TUPLE
    + pickle.BINPERSID
)
ODD = {
    "a stand-in that is called": pickled(NAMESPACE, b")R", b")R"),
    "state for a function": pickled(NAMESPACE, b"0", REBUILD, b"}U\x01aK\x01sb", b")R"),
    "state for a class": pickled(NAMESPACE, b"N}U\x01aK\x01s\x86b", b"N\x85b"),
    "a tensor beyond its storage": pickled(
        NAMESPACE, b"0", REBUILD, pickle.MARK, STORAGE, b"K\x00", b"J\x00\x00\x00\x40\x85", b"K\x01\x85", b"\x89}tR"
    ),
    "a tensor before its storage": pickled(
        NAMESPACE, b"0", REBUILD, pickle.MARK, STORAGE, b"J\xff\xff\xff\xff", b"K\x01\x85", b"K\x01\x85", b"\x89}tR"
    ),
    "a tensor of no storage": pickled(NAMESPACE, b"0", REBUILD, b"(K\x00K\x00)N\x89}tR"),
    "a reference to a file": pickled(NAMESPACE, b"0U\x0b/etc/passwdQ"),
    "a large index of the memo": pickled(NAMESPACE, pickle.LONG_BINPUT, b"\xff\xff\xff\x7f"),
    "a large array of bytes": pickled(NAMESPACE, pickle.BYTEARRAY8, (1 << 40).to_bytes(8, "little")),
    "a registered extension": pickled(NAMESPACE, pickle.EXT1, b"\x01"),
    "an object of Python 2": pickled(b"(iargparse\nNamespace\n"),
}


@pytest.mark.parametrize("case", ODD)
def test_odd_pickles_are_refused(tmp_path, case):
    torch.save({"a": torch.zeros(6)}, tmp_path / "a.pth")
    rewrite(tmp_path / "a.pth", lambda data: ODD[case])
    with pytest.raises(ValueError, match="a.pth: ") as error:
        read_state(tmp_path / "a.pth")
    assert "\n" not in str(error.value)


def test_scripted_models_are_refused(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "a.pth")
    with pytest.raises(ValueError, match="a.pth: "):
        read_state(tmp_path / "a.pth")


def test_files_of_before_torch_1_6_are_read_where_they_hold_tensors_only(tmp_path):
    torch.save({"model": TENSORS}, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    assert same(read_state(tmp_path / "a.pth"), TENSORS)
    state = {"model": TENSORS, "args": argparse.Namespace()}
    torch.save(state, tmp_path / "b.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="b.pth: .*before torch 1.6.*save only its state dict"):
        read_state(tmp_path / "b.pth")


def test_other_tensors_among_stand_ins_are_named(tmp_path):
    torch.save({"a": torch.eye(2).to_sparse(), "args": argparse.Namespace()}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="a.pth: a is a tensor by torch._utils._rebuild_sparse_tensor"):
        read_state(tmp_path / "a.pth")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(2))
def test_changed_bytes_give_tensors_or_a_line(tmp_path, seed):
    """Nothing but a ValueError comes out, whatever byte, opcode or length of the pickle is changed."""
    draw, file = random.Random(seed), tmp_path / "a.pth"
    torch.save({"model": TENSORS, "args": argparse.Namespace(a=[1, {2}]), "x": Reduces(os.getpid, ())}, file)
    whole, read = file.read_bytes(), 0
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        length = len(archive.read("a/data.pkl"))
    start = whole.index(pickle.PROTO + b"\x02")
    for _ in range(100):
        data = bytearray(whole)
        for _ in range(draw.randint(1, 3)):
            data[start + draw.randrange(length)] = draw.choice([draw.randrange(256), *b"ctRb.0(Q}u"])
        rewritten = fixed(bytes(data), start, length)
        try:
            read += bool(read_state(file, rewritten))
        except ValueError as error:
            assert "a.pth: " in str(error)
    assert read  # some changes are harmless


def fixed(data: bytes, start: int, length: int) -> bytes:
    """The archive with the pickle that starts there, and the checksum of it."""
    packed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(packed, "w") as target:
        for member in source.infolist():
            changed = data[start : start + length] if member.filename.endswith("data.pkl") else source.read(member)
            target.writestr(member.filename, changed)
    return packed.getvalue()
