"""Errors against brute force, and a planted fault found where it was planted."""

import json
import re

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from qswin.calib.trt_cache.session import Session
from qswin.trt.evaluation.compare import (
    first_parting,
    graph_activations,
    layer_errors,
    output_errors,
    relative_error,
    residual_stream,
    sentence,
)
from qswin.trt.graphs.files import read_onnx
from tests.helpers import fails, invoke


def test_output_errors_by_hand():
    ours, reference = np.array([[1.0, 5.0], [3.0, 2.0]]), np.array([[2.0, 4.0], [2.0, 4.0]])
    errors = output_errors(ours, reference, "classification")
    assert (errors["max_abs"], errors["mean_abs"], errors["median_abs"]) == (2, 1.25, 1)
    assert (errors["max_rel"], errors["median_rel"]) == (0.5, 0.5)
    assert (errors["top1_agreement"], errors["nan"]) == (50, 0)


def test_what_is_said_of_errors():
    errors = output_errors(np.array([[1.0, np.nan], [3.0, 2.0]]), np.array([[2.0, 4.0], [3.0, 2.0]]), "features")
    assert sentence({**errors, "mean_abs": 0.5, "max_abs": 2.0}, 2) == (
        "values of the feature maps of 2 images differ by 0.5 on average, by 2 at most; 1 are NaN or infinite"
    )


def test_values_that_are_not_finite_are_infinitely_wrong():
    assert relative_error(np.array([1.0, np.nan]), np.ones(2)) == np.inf
    assert relative_error(np.array([3.0, 4.0]), np.array([0.0, 4.0])) == pytest.approx(0.75)
    assert output_errors(np.array([[np.nan, 1.0]]), np.ones((1, 2)), "classification")["nan"] == 1


def errors_of(model, reference, images):
    return layer_errors(graph_activations(model, reference, images), reference, images)


def test_a_planted_fault_is_found_where_it_is(graphs, tmp_path):
    """A changed bias of the second block's normalization: nothing differs before it, and it is named first."""
    model = onnx.load(graphs["fp32"])
    norms = [node for node in model.graph.node if node.op_type == "LayerNormalization"]
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == norms[3].input[1])
    weight.CopyFrom(numpy_helper.from_array(3 * numpy_helper.to_array(weight), weight.name))
    onnx.save(model, tmp_path / "broken.onnx")
    images = np.random.default_rng(0).standard_normal((2, 3, 32, 32), dtype=np.float32)
    errors = errors_of(tmp_path / "broken.onnx", graphs["fp32"], images)
    assert first_parting(errors, 0.1).startswith(f"they part at {norms[3].output[0]}:")
    assert all(error == 0 for name, error in errors[: [name for name, _ in errors].index(norms[3].output[0])])
    assert first_parting(errors_of(graphs["fp32"], graphs["fp32"], images), 1e-6).startswith("no tensor")


@pytest.mark.parametrize(("ours", "reference"), [("int8", "fp32"), ("int8-scaled", "fp32-scaled")])
def test_graphs_of_one_network_are_paired_whatever_their_names(graphs, ours, reference):
    """Q/DQ, Casts and channel scales do not count; INT8's error is small at every layer, so the pairs are right."""
    images = np.random.default_rng(0).standard_normal((2, 3, 32, 32), dtype=np.float32)
    errors = errors_of(graphs[ours], graphs[reference], images)
    assert len(errors) > 60 and max(error for _, error in errors) < 0.3
    assert max(error for _, error in errors_of(graphs["fp16"], graphs["fp32"], images)) < 0.02


def test_graphs_of_two_networks_are_an_error(graphs):
    with pytest.raises(ValueError, match="not the same network: operation .* is .*, in the reference"):
        errors_of(graphs["fp32-17"], graphs["fp32"], np.zeros((1, 3, 32, 32), dtype=np.float32))


def test_the_residual_stream_is_what_norms_read(graphs):
    model = read_onnx(graphs["fp32"])
    assert len(residual_stream(model)) == sum(node.op_type == "LayerNormalization" for node in model.graph.node)


def test_the_command_compares_int8_with_float(graphs, tmp_path, capsys):
    arguments = ["--model", str(graphs["int8"]), "--reference", str(graphs["fp32"]), "--images", "8", "--layers"]
    assert invoke("compare", *arguments, "--json", tmp_path / "c.json") == 0
    report = json.loads((tmp_path / "c.json").read_text())
    assert report["kind"] == "comparison"
    assert 0 < report["mean_abs"] < 0.2 and report["layers"] and report["nan"] == 0
    said = capsys.readouterr().out
    assert report["parting"] in said and re.search(r"the same class for \d+\.\d % of 8 images; logits differ by", said)


def test_layers_have_the_time_that_runs_have(graphs, monkeypatch):
    """Also where the reference's activations are taken, with nothing fused."""
    given, begin = [], Session.__init__

    def noting(self, path, model, timeout=None, *rest, **more):
        given.append(timeout)
        begin(self, path, model, timeout, *rest, **more)

    monkeypatch.setattr(Session, "__init__", noting)
    arguments = ["--model", graphs["fp32"], "--reference", graphs["fp32"], "--images", 1, "--layers", "--timeout", 77]
    assert invoke("compare", *arguments) == 0
    assert given == [77] * 4


def test_unreadable_images_are_skipped_where_that_is_asked_for(graphs, data, capsys):
    (bad := data / "val" / "class0" / "0.png").write_bytes(b"no image")
    common = ["--model", graphs["fp32"], "--reference", graphs["fp32"], "--data", data / "val", "--images", 0]
    assert f"{bad}: missing, or cannot be read" in (line := fails(capsys, "compare", *common))
    assert "--skip-unreadable" in line
    assert invoke("compare", *common, "--skip-unreadable") == 0
    assert "by 0 on average, by 0 at most" in capsys.readouterr().out
