"""Engines with our plugin, without a GPU: which library is taken, which batches, and what TensorRT is asked for."""

import shutil
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest

from qswin.calib.files import write_with_sidecar
from qswin.trt.engines import plugin, plugin_network
from qswin.trt.engines.engine import KIND, BuiltModel
from qswin.trt.engines.plugin import check_library, check_loaded, load_plugin
from qswin.trt.engines.plugin_network import (
    Classifier,
    PluginOptions,
    add_classifier,
    build_plugin_engine,
    choose_profile,
    with_shared_profile,
)
from qswin.trt.engines.version import TensorRT, capabilities
from tests.helpers import SIDECAR

TENSORRT86 = TensorRT("tensorrt", "8.6.0", capabilities("tensorrt", "8.6.0"))
BUNDLE = Classifier(b"bytes of a bundle", (3, 32, 32), (1, 4))


@pytest.fixture
def library(tmp_path):
    """Compiles a library that says it is for a version of TensorRT, 806 being 8.6."""
    if shutil.which("g++") is None:
        pytest.skip("there is no g++")

    def compiled(version: int, name: str = "qswin_tensorrt_version"):
        path = tmp_path / f"{name}{version}.so"
        code = f'extern "C" int {name}() {{ return {version}; }}'
        command = ["g++", "-shared", "-fPIC", "-x", "c++", "-", "-o", str(path)]
        subprocess.run(command, input=code, text=True, check=True)
        return path

    return compiled


class Registry:
    """TensorRT's, of which a library makes the plugin known."""

    def __init__(self) -> None:
        self.plugin_creator_list = [SimpleNamespace(name="Another")]
        self.loaded: list[str] = []
        self.takes = True

    def load_library(self, path: str) -> object | None:
        self.loaded.append(path)
        if not self.takes:
            return None
        self.plugin_creator_list.append(SimpleNamespace(name="QswinBundle", create_plugin=self.create))
        return object()

    def create(self, name, fields):
        (field,) = fields
        return None if field["data"] == b"refused" else field


@pytest.fixture
def registry(monkeypatch):
    """A TensorRT 8.6 that has this registry."""
    found = Registry()
    features = SimpleNamespace(PROFILE_SHARING_0806="sharing")
    trt = SimpleNamespace(
        get_plugin_registry=lambda: found,
        PluginField=lambda name, data, kind: {"name": name, "data": data.tobytes(), "kind": kind, "dtype": data.dtype},
        PluginFieldType=SimpleNamespace(INT8="int8"),
        PluginFieldCollection=list,
        PreviewFeature=features,
        float32="float32",
    )
    for module in (plugin, plugin_network):
        monkeypatch.setattr(module, "tensorrt_module", lambda: trt)
    monkeypatch.setattr(plugin, "find_tensorrt", lambda target: TENSORRT86)
    return found


def test_a_library_is_loaded_once(registry, library):
    with pytest.raises(ValueError, match="x.engine: its layers are in libqswin_trt.so, .* give --plugin"):
        check_loaded("x.engine")
    path = library(806)
    assert load_plugin(path) == load_plugin(path) == TENSORRT86
    assert registry.loaded == [str(path)]
    check_loaded("x.engine")


def test_a_library_that_is_none_of_ours_or_for_another_tensorrt_is_not_loaded(registry, library, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such library"):
        load_plugin(tmp_path / "missing.so")
    (tmp_path / "text.so").write_text("text")
    for path in (tmp_path / "text.so", library(806, "another")):
        with pytest.raises(ValueError, match=r"is not libqswin_trt.so of cpp/, or cannot be loaded \("):
            load_plugin(path)
    with pytest.raises(ValueError, match=r"compiled for TensorRT 10\.9, here is 8\.6\.0; build it with headers of 8$"):
        load_plugin(library(1009))
    check_library(library(805), TENSORRT86)
    assert not registry.loaded
    registry.takes = False
    with pytest.raises(ValueError, match=r"TensorRT 8\.6\.0 does not take it"):
        load_plugin(library(806))


def test_a_tensorrt_that_loads_no_libraries_says_so(registry, library, monkeypatch):
    monkeypatch.delattr(Registry, "load_library")
    with pytest.raises(ValueError, match=r"loads no libraries of plugins; 8\.6 and newer do"):
        load_plugin(library(806))


def test_batches_are_those_of_the_bundle():
    held = (1, 64, 256)
    assert choose_profile("x.qsb", held, None) == (1, 256, 256)
    assert choose_profile("x.qsb", held, (1, 64, 64)) == (1, 64, 64)
    with pytest.raises(ValueError, match="x.qsb: holds batches of 1, 64, 256, not of 8; choose --batch-sizes among"):
        choose_profile("x.qsb", held, (1, 8, 64))


class Network:
    """A network that remembers what is added to it."""

    def __init__(self) -> None:
        self.logits = SimpleNamespace(name="")
        self.layer = SimpleNamespace(name="", get_output=lambda index: self.logits)

    def add_input(self, name, dtype, shape):
        self.input = (name, dtype, shape)
        return self.input

    def add_plugin_v2(self, inputs, made):
        self.inputs, self.made = inputs, made
        return self.layer

    def mark_output(self, tensor):
        self.output = tensor


def test_the_network_is_one_layer_with_the_bundle_in_it(registry, library):
    load_plugin(library(806))
    network = Network()
    add_classifier("x.qsb", network, BUNDLE)
    assert network.input == ("input", "float32", (-1, 3, 32, 32)) and network.inputs == [network.input]
    assert network.made == {"name": "bundle", "data": BUNDLE.data, "kind": "int8", "dtype": np.int8}
    assert network.output is network.logits and network.logits.name == "logits"
    with pytest.raises(ValueError, match="x.qsb: libqswin_trt.so does not take it; its error is above"):
        add_classifier("x.qsb", network, Classifier(b"refused", BUNDLE.image, (1,)))


def test_contexts_may_share_the_profile(registry):
    config = SimpleNamespace(set_preview_feature=lambda feature, on: features.append((feature, on)))
    features: list[tuple[str, bool]] = []
    assert with_shared_profile(lambda builder, network: config)(None, None) is config
    assert features == [("sharing", True)]


def test_without_a_gpu_nothing_is_built(registry, library, monkeypatch):
    monkeypatch.setattr(plugin_network, "find_gpu", lambda: None)
    with pytest.raises(ValueError, match=r"TensorRT 8\.6\.0 builds on a GPU, and there is none here$"):
        build_plugin_engine("x.qsb", BUNDLE, PluginOptions(plugin=library(806)))


def test_an_engine_of_some_batches_fills_up_to_the_next(tmp_path):
    built = {"target": "tensorrt", "version": "8.6.0", "profile": [1, 64, 256], "capability": "9.0"}
    write_with_sidecar(tmp_path / "a.engine", b"plan", KIND, SIDECAR | built)
    assert [BuiltModel(tmp_path / "a.engine", KIND).next_size(count) for count in (1, 2, 300)] == [1, 2, 300]
    held = built | {"plugin": "libqswin_trt.so", "batch_sizes": [1, 64, 256]}
    write_with_sidecar(tmp_path / "a.engine", b"plan", KIND, SIDECAR | held)
    model = BuiltModel(tmp_path / "a.engine", KIND)
    assert model.batch_sizes == (1, 64, 256) and model.sidecar.plugin == "libqswin_trt.so"
    assert [model.next_size(count) for count in (1, 2, 64, 65, 300)] == [1, 64, 64, 256, 300]
