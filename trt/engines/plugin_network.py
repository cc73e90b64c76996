"""Engines whose one layer is our plugin of cpp/tensorrt, with a bundle in it. docs/bundle.md describes both."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from qswin.trt.engines.cuda import find_gpu
from qswin.trt.engines.network import builder_config
from qswin.trt.engines.options import BuildOptions
from qswin.trt.engines.plugin import LIBRARY, NAME, find_creator, load_plugin
from qswin.trt.engines.version import TensorRT, tensorrt_module

FIELD = "bundle"  # what the plugin is made from, as cpp/tensorrt/plugin.h has it


@dataclasses.dataclass(frozen=True)
class PluginOptions:
    """How to build an engine of a bundle. The names are those of the flags of `qswin build`.

    Attributes:
        plugin: libqswin_trt.so.
        batch_sizes: smallest, usual and largest batch, each of the bundle's; None for its smallest and largest.

    Raises:
        ValueError: the plugin is not given, or the target has none.
    """

    target: str = "tensorrt"
    plugin: Path | None = None
    batch_sizes: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        if self.target != "tensorrt":
            raise ValueError(
                f"--bundle is not for --target {self.target}, which has no such plugins; --target tensorrt"
            )
        if self.plugin is None:
            raise ValueError(f"--bundle needs --plugin FILE, {LIBRARY} of cpp/; docs/bundle.md says how it is built")


@dataclasses.dataclass(frozen=True)
class Classifier:
    """What a network with a bundle is made from.

    Attributes:
        data: the bundle's bytes.
        image: channels, height and width.
        batch_sizes: that the bundle holds.
    """

    data: bytes
    image: tuple[int, int, int]
    batch_sizes: tuple[int, ...]


def choose_profile(path: Path, held: tuple[int, ...], asked: tuple[int, int, int] | None) -> tuple[int, int, int]:
    """Smallest, usual and largest batch. Raises ValueError for one that the bundle lacks."""
    profile = (held[0], held[-1], held[-1]) if asked is None else asked
    if missing := [batch for batch in profile if batch not in held]:
        sizes = ", ".join(map(str, held))
        raise ValueError(f"{path}: holds batches of {sizes}, not of {missing[0]}; choose --batch-sizes among them")
    return profile


def build_plugin_engine(
    path: Path, model: Classifier, options: PluginOptions
) -> tuple[bytes, tuple[int, int, int], TensorRT]:
    """Builds an engine of a bundle: `input` (N, C, H, W) float32, `logits` (N, classes) float32, one layer between.

    Args:
        path: of the bundle, for messages.

    Returns:
        The serialized engine; its smallest, usual and largest batch; what built it.

    Raises:
        FileNotFoundError: there is no such library.
        ValueError: the bundle lacks a batch size, there is no GPU or no TensorRT, the library is not the plugin's, or
            TensorRT cannot build the network.
    """
    from polygraphy.backend.trt import create_network, engine_bytes_from_network
    from polygraphy.exception import PolygraphyException

    assert options.plugin is not None
    profile = choose_profile(path, model.batch_sizes, options.batch_sizes)
    tensorrt = load_plugin(options.plugin)
    if find_gpu() is None:
        raise ValueError(f"{tensorrt} builds on a GPU, and there is none here")
    try:
        builder, network = create_network(strongly_typed=not tensorrt.can.weak_typing)
        add_classifier(path, network, model)
        config = builder_config(network, profile, BuildOptions(precision="fp32"), tensorrt, None, ())
        engine = engine_bytes_from_network((builder, network), with_shared_profile(config))
    except PolygraphyException as error:
        raise ValueError(f"{path}: {tensorrt} cannot build it ({error}); its log is above") from error
    return bytes(engine), profile, tensorrt


def with_shared_profile(loader: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """A loader of a configuration for engines with several contexts at once: 8.6 wants a profile for each otherwise."""

    def create(builder: Any, network: Any) -> Any:
        config, features = loader(builder, network), getattr(tensorrt_module(), "PreviewFeature", None)
        if (feature := getattr(features, "PROFILE_SHARING_0806", None)) is not None:
            config.set_preview_feature(feature, True)
        return config

    return create


def add_classifier(path: Path, network: Any, model: Classifier) -> None:
    """Adds input, layer and output to an empty network. Raises ValueError where the plugin refuses the bundle."""
    trt = tensorrt_module()
    images = network.add_input("input", trt.float32, (-1, *model.image))
    layer = network.add_plugin_v2([images], make_plugin(path, model.data))
    layer.name = NAME
    logits = layer.get_output(0)
    logits.name = "logits"
    network.mark_output(logits)


def make_plugin(path: Path, data: bytes) -> Any:
    """TensorRT's IPluginV2 of a bundle, whose library is loaded. Raises ValueError where it refuses the bundle."""
    trt, creator = tensorrt_module(), find_creator()
    assert creator is not None
    field = trt.PluginField(FIELD, np.frombuffer(data, dtype=np.int8), trt.PluginFieldType.INT8)
    plugin = creator.create_plugin(NAME, trt.PluginFieldCollection([field]))
    if plugin is None:
        raise ValueError(f"{path}: {LIBRARY} does not take it; its error is above")
    return plugin
