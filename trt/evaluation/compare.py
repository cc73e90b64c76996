"""Where and how much two models differ: their logits, and activations of two graphs or of an engine and its graph."""

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from qswin.calib.data.batches import image_batches, warn_of_skipped
from qswin.calib.data.folders import scan_unlabelled, spread_samples
from qswin.calib.data.images import Preprocessing, noise_images
from qswin.calib.data.shards import ImageFile
from qswin.calib.files import read_sidecar
from qswin.calib.messages import text_of
from qswin.calib.trt_cache.offline import activations, value_sources
from qswin.calib.validation import Sha256, take
from qswin.trt.engines.build import prepare_graph
from qswin.trt.engines.engine import KIND, REMEDY
from qswin.trt.engines.network import build_network
from qswin.trt.engines.options import BuildOptions
from qswin.trt.engines.version import find_tensorrt
from qswin.trt.evaluation.evaluate import Predictor
from qswin.trt.graphs.files import open_onnx, read_onnx
from qswin.trt.graphs.half_precision import QDQ

BATCH_SIZE = 16
CHANNEL_SCALE = "._pre_quant_scale"  # ends the name of what a Mul before Q multiplies by; float graphs have none


def logits_of(predict: Callable[[np.ndarray], np.ndarray], images: np.ndarray, size: int) -> np.ndarray:
    """(N, classes) of images (N, 3, H, W), in batches of at most `size`."""
    return np.concatenate([predict(images[at : at + size]) for at in range(0, len(images), size)])


def output_errors(ours: np.ndarray, reference: np.ndarray, task: str) -> dict[str, float]:
    """Errors of logits, or of feature maps, against a reference's.

    Args:
        ours, reference: (N, classes), or (N, values) of feature maps.
        task: what the models are for.

    Returns:
        {"max_abs", "mean_abs", "median_abs"}; the same of |ours - reference| / |reference| as "_rel"; of logits,
        "top1_agreement" in per cent; "nan", how many values of ours are NaN or infinite.
    """
    difference = np.abs(ours.astype(np.float64) - reference)
    relative = difference / np.maximum(np.abs(reference), np.finfo(np.float32).tiny)
    errors: dict[str, Any] = {}
    for kind, values in (("abs", difference), ("rel", relative)):
        errors |= {f"max_{kind}": values.max(), f"mean_{kind}": values.mean(), f"median_{kind}": np.median(values)}
    if task != "features":
        errors["top1_agreement"] = 100 * (ours.argmax(axis=1) == reference.argmax(axis=1)).mean()
    errors = {name: float(value) for name, value in errors.items()}
    return {**errors, "nan": int((~np.isfinite(ours)).sum())}


def shared_batch_size(ours: Predictor, theirs: Predictor) -> int:
    """Images of a batch that both models take; 16 where they take any number."""
    return min(ours.batch_size or BATCH_SIZE, theirs.batch_size or BATCH_SIZE)


def model_errors(ours: Predictor, reference: Predictor, images: np.ndarray) -> dict[str, float]:
    """`output_errors` of a model against a reference on images (N, 3, H, W)."""
    size = shared_batch_size(ours, reference)
    outputs, expected = (logits_of(predictor, images, size) for predictor in (ours, reference))
    return output_errors(outputs, expected, reference.task)


def sentence(errors: dict[str, float], images: int) -> str:
    """What `output_errors` found on so many images, for people."""
    what = f"values of the feature maps of {images} images"
    if "top1_agreement" in errors:
        what = f"the same class for {errors['top1_agreement']:.1f} % of {images} images; logits"
    told = f"{what} differ by {errors['mean_abs']:.3g} on average, by {errors['max_abs']:.3g} at most"
    return f"{told}; {errors['nan']} are NaN or infinite" if errors["nan"] else told


def relative_error(ours: np.ndarray, reference: np.ndarray) -> float:
    """||ours - reference|| / ||reference||; infinite where ours is not finite."""
    if not np.isfinite(ours).all():
        return float("inf")
    difference = float(np.linalg.norm(ours.astype(np.float64).ravel() - reference.ravel()))
    return difference / max(float(np.linalg.norm(reference.astype(np.float64).ravel())), 1e-30)


def layer_errors(
    values: dict[str, np.ndarray], reference: Path, images: np.ndarray, timeout: float | None = None
) -> list[tuple[str, float]]:
    """The relative errors of activations against those of a reference graph in ONNX Runtime.

    Args:
        values: {tensor of the reference: its values for the images in the other model}.
        images: (N, 3, H, W).
        timeout: seconds that a run may take; None for any number.

    Returns:
        (tensor, error), in the order of `values`.
    """
    expected = activations(reference, read_onnx(reference), list(values), images, timeout)
    return [(name, relative_error(values[name], expected[name])) for name in values]


def graph_activations(
    path: Path, reference: Path, images: np.ndarray, timeout: float | None = None
) -> dict[str, np.ndarray]:
    """{tensor of the reference: its values in another graph of the same network}, in the reference's order.

    Raises:
        ValueError: the graphs are of different networks.
    """
    other = read_onnx(path)
    same = same_tensors(other, read_onnx(reference))
    found = activations(path, other, list(same.values()), images, timeout)
    return {name: found[same[name]] for name in same}


def same_tensors(other: onnx.ModelProto, graph: onnx.ModelProto) -> dict[str, str]:
    """{activation of `graph`: what it is called in `other`}, in order. The exporter numbers both graphs on its own.

    Raises:
        ValueError: apart from Q/DQ and Casts, the graphs are not the same operations on the same operands.
    """
    ours, theirs = arithmetic(other), arithmetic(graph)
    for index, (a, b) in enumerate(itertools.zip_longest(ours, theirs)):
        if a is None or b is None or a.op_type != b.op_type:
            kinds = [node.op_type if node else "not there" for node in (a, b)]
            raise ValueError(f"not the same network: operation {index} is {kinds[0]}, in the reference {kinds[1]}")
    pairs = {b.output[0]: a.output[0] for a, b in zip(ours, theirs, strict=True)}
    return {name: pairs[name] for name, source in value_sources(graph).items() if name == source and name in pairs}


def arithmetic(graph: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The nodes apart from Q/DQ, with the Clip of fewer than 8 bits and the channel scales before it, and Casts.

    Each comes after its operands. Graphs of one network give one order, whatever order the exporter wrote their nodes
    in.
    """
    clipped = {node.input[0] for node in graph.graph.node if node.op_type == "QuantizeLinear"}
    nodes = [node for node in _from_the_outputs(graph) if node.op_type not in (*QDQ, "Cast")]
    nodes = [node for node in nodes if not any(name.endswith(CHANNEL_SCALE) for name in node.input)]
    return [node for node in nodes if node.op_type != "Clip" or node.output[0] not in clipped]


def _from_the_outputs(graph: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The nodes in depth-first order from the graph's outputs, operands first."""
    producers = {output: node for node in graph.graph.node for output in node.output}
    found: dict[str, onnx.NodeProto] = {}  # by the node's first output
    pending = [(producers[output.name], False) for output in reversed(graph.graph.output)]
    while pending:
        node, operands_done = pending.pop()
        if node.output[0] in found:
            continue
        if operands_done:
            found[node.output[0]] = node
            continue
        pending.append((node, True))
        pending += [(producers[name], False) for name in reversed(node.input) if name in producers]
    return list(found.values())


def residual_stream(graph: onnx.ModelProto) -> list[str]:
    """What the graph's LayerNormalizations read."""
    return [node.input[0] for node in graph.graph.node if node.op_type == "LayerNormalization"]


@dataclasses.dataclass(frozen=True)
class EngineSource:
    """Of an engine's sidecar: what it was built from, and how."""

    onnx: str
    onnx_sha256: Sha256
    target: str
    engine_precision: str
    overrides: tuple[str, ...]


def engine_activations(path: Path, reference: Path, images: np.ndarray) -> dict[str, np.ndarray]:
    """{tensor of the reference: its values in an engine} of the residual stream.

    The engine is built again from the reference with what its normalizations read as outputs: with every activation
    given out, TensorRT 8.6 finds no implementation.

    Raises:
        ValueError: the engine was built from another ONNX file, or from a bundle.
    """
    from polygraphy.backend.trt import TrtRunner, engine_from_bytes

    sidecar = read_sidecar(path, KIND, (), REMEDY)
    if "bundle" in sidecar:
        raise ValueError(f"{path}: built from a bundle, which is one layer; --layers is for engines of ONNX files")
    source = take(sidecar, EngineSource, f"{path}: its sidecar", REMEDY)
    graph, digest = open_onnx(reference)
    if source.onnx_sha256 != digest:
        raise ValueError(
            f"{path}: built from {source.onnx}, not from {reference}; --layers needs the file it was built from"
        )
    tensorrt, batch = find_tensorrt(source.target), len(images)
    options = BuildOptions(
        target=source.target,
        precision=source.engine_precision,
        batch_sizes=(batch, batch, batch),
        override=source.overrides,
    )
    prepared, overrides = prepare_graph(graph, options, tensorrt)
    engine, _ = build_network(reference, prepared, options, tensorrt, overrides, outputs=residual_stream(graph))
    with TrtRunner(engine_from_bytes(engine)) as runner:
        return {name: np.array(value) for name, value in runner.infer({"input": images}).items()}


def worst_layers(errors: list[tuple[str, float]], count: int = 10) -> str:
    """The tensors with the largest errors, a line each."""
    worst = sorted(errors, key=lambda item: -item[1])[:count]
    return text_of(f"{error:10.5f}  {name}" for name, error in worst)


def first_parting(errors: list[tuple[str, float]], tolerance: float) -> str:
    """A sentence on the first tensor whose error is above the tolerance."""
    for name, error in errors:
        if error > tolerance:
            return f"they part at {name}: relative error {error:.4f}"
    return f"no tensor's relative error is above {tolerance}"


def read_images(
    data: Path | None, count: int, task: str, preprocessing: Preprocessing, skip_unreadable: bool = False
) -> np.ndarray:
    """(N, 3, H, W): images spread evenly over a folder, or noise where there is no folder.

    Raises:
        ValueError: a file cannot be read and is not to be skipped, or no image is left.
    """
    if data is None:
        return noise_images(count, preprocessing)
    skipped: list[ImageFile] | None = [] if skip_unreadable else None
    samples = spread_samples(scan_unlabelled(task, data), count)
    images = [batch.images for batch in image_batches(samples, preprocessing, 16, skipped=skipped)]
    warn_of_skipped(skipped)
    if not images:
        raise ValueError(f"{data}: 0 images that can be read")
    return np.concatenate(images)
