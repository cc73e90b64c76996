"""Where and how much two models differ: an engine or ONNX file against an ONNX file. The command `qswin compare`."""

import argparse
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from qswin.calib.data.batches import image_batches
from qswin.calib.data.folders import scan_folder, spread_samples
from qswin.calib.data.images import Preprocessing, noise_images
from qswin.calib.files import sha256
from qswin.calib.trt_cache.offline import activations, value_sources
from qswin.trt.engines.build import BuildOptions, build_network, prepare_graph
from qswin.trt.engines.engine import SUFFIXES, read_sidecar
from qswin.trt.engines.version import find_backend
from qswin.trt.graphs.files import read_onnx
from qswin.trt.graphs.half_precision import QDQ


def output_errors(ours: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """Errors of logits against a reference's.

    Args:
        ours, reference: (N, classes).

    Returns:
        {"max_abs", "mean_abs", "median_abs"}; the same of |ours - reference| / |reference| as "_rel"; "top1_agreement" in
        per cent; "nan", how many values of ours are NaN or infinite.
    """
    difference = np.abs(ours.astype(np.float64) - reference)
    relative = difference / np.maximum(np.abs(reference), np.finfo(np.float32).tiny)
    errors: dict[str, Any] = {}
    for kind, values in (("abs", difference), ("rel", relative)):
        errors |= {f"max_{kind}": values.max(), f"mean_{kind}": values.mean(), f"median_{kind}": np.median(values)}
    agreement = 100 * (ours.argmax(axis=1) == reference.argmax(axis=1)).mean()
    errors = {name: float(value) for name, value in errors.items()}
    return {**errors, "top1_agreement": float(agreement), "nan": int((~np.isfinite(ours)).sum())}


def relative_error(ours: np.ndarray, reference: np.ndarray) -> float:
    """||ours - reference|| / ||reference||; infinite where ours is not finite."""
    if not np.isfinite(ours).all():
        return float("inf")
    difference = float(np.linalg.norm(ours.astype(np.float64).ravel() - reference.ravel()))
    return difference / max(float(np.linalg.norm(reference.astype(np.float64).ravel())), 1e-30)


def layer_errors(model: Path, reference: Path, images: np.ndarray) -> list[tuple[str, float]]:
    """(tensor, relative error) of the activations of two graphs of one network, in the reference's order and by its names.

    An engine is built again from the reference, which must be the file it was built from, with what its normalizations read,
    the residual stream, as outputs: with every activation given out, TensorRT 8.6 finds no implementation.

    Raises:
        ValueError: the engine was built from another ONNX file, or the graphs are of different networks.
    """
    graph = read_onnx(reference)
    if model.suffix in SUFFIXES:
        values = _engine_activations(model, reference, graph, residual_stream(graph), images)
    else:
        other = read_onnx(model)
        same = same_tensors(other, graph)
        found = activations(other, [same[name] for name in same], images)
        values = {name: found[same[name]] for name in same}
    expected = activations(graph, list(values), images)
    return [(name, relative_error(values[name], expected[name])) for name in values]


def same_tensors(other: onnx.ModelProto, graph: onnx.ModelProto) -> dict[str, str]:
    """{activation of `graph`: what it is called in `other`}, in order. The exporter numbers both graphs on its own.

    Raises:
        ValueError: apart from Q/DQ and Casts, the graphs are not the same operations in the same order.
    """
    ours, theirs = arithmetic(other), arithmetic(graph)
    for index, (a, b) in enumerate(itertools.zip_longest(ours, theirs)):
        if a is None or b is None or a.op_type != b.op_type:
            kinds = [node.op_type if node else "not there" for node in (a, b)]
            raise ValueError(f"not the same network: operation {index} is {kinds[0]}, in the reference {kinds[1]}")
    pairs = {b.output[0]: a.output[0] for a, b in zip(ours, theirs, strict=True)}
    return {name: pairs[name] for name, source in value_sources(graph).items() if name == source and name in pairs}


def arithmetic(graph: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The nodes apart from Q/DQ, with the Clip of fewer than 8 bits before it, and Casts."""
    clipped = {node.input[0] for node in graph.graph.node if node.op_type == "QuantizeLinear"}
    nodes = [node for node in graph.graph.node if node.op_type not in (*QDQ, "Cast")]
    return [node for node in nodes if node.op_type != "Clip" or node.output[0] not in clipped]


def residual_stream(graph: onnx.ModelProto) -> list[str]:
    """What the graph's LayerNormalizations read."""
    return [node.input[0] for node in graph.graph.node if node.op_type == "LayerNormalization"]


def _engine_activations(
    model: Path, reference: Path, graph: onnx.ModelProto, names: list[str], images: np.ndarray
) -> dict[str, np.ndarray]:
    from polygraphy.backend.trt import TrtRunner, engine_from_bytes

    sidecar = read_sidecar(model)
    if sidecar["onnx_sha256"] != sha256(reference):
        raise ValueError(
            f"{model}: built from {sidecar['onnx']}, not from {reference}; --layers needs the file it was built from"
        )
    backend, batch = find_backend(sidecar["target"]), len(images)
    options = BuildOptions(
        precision=sidecar["engine_precision"],
        target=sidecar["target"],
        profile=(batch, batch, batch),
        overrides=tuple(sidecar["overrides"]),
    )
    prepared, overrides = prepare_graph(graph, options, backend)
    engine, _ = build_network(reference, prepared, options, backend, overrides, outputs=names)
    with TrtRunner(engine_from_bytes(engine)) as runner:
        return {name: np.array(value) for name, value in runner.infer({"input": images}).items()}


def first_parting(errors: list[tuple[str, float]], tolerance: float) -> str:
    """A sentence on the first tensor whose error is above the tolerance."""
    for name, error in errors:
        if error > tolerance:
            return f"they part at {name}: relative error {error:.4f}"
    return f"no tensor's relative error is above {tolerance}"


def read_images(args: argparse.Namespace, task: str, preprocessing: Preprocessing) -> np.ndarray:
    """(N, 3, H, W): images spread evenly over the folder, or noise."""
    if args.data is None:
        return noise_images(args.images, preprocessing)
    samples = spread_samples(scan_folder(task, args.data), args.images)
    return np.concatenate([batch.images for batch in image_batches(samples, preprocessing, 16)])
