"""docs/after_export.md: its Python runs and gives what qswin gives; its configs name what a graph has."""

import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

from qswin.calib.data.images import load_image
from qswin.trt.graphs.runtime import OnnxRuntimePredictor

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "after_export.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.S | re.M)


@pytest.mark.parametrize("size", [(57, 41), (40, 90), (33, 33)])
def test_the_python_gives_the_logits_of_qswin(graphs, tmp_path, monkeypatch, capsys, size):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "int8.onnx").write_bytes(graphs["int8"].read_bytes())
    rough = np.random.default_rng(0).integers(0, 256, (7, 7, 3)).astype(np.uint8)
    Image.fromarray(rough).resize(size).save("photo.jpg")
    ran: dict = {}
    exec(blocks("python")[0], ran)
    predictor = OnnxRuntimePredictor("int8.onnx")
    expected = predictor(load_image("photo.jpg", predictor.preprocessing)[None])
    np.testing.assert_allclose(ran["pixels"], load_image("photo.jpg", predictor.preprocessing)[None], atol=1e-5)
    np.testing.assert_allclose(ran["logits"], expected, atol=1e-3)
    assert capsys.readouterr().out == f"{predictor.classes[expected.argmax()]}\n"


def test_the_configs_name_what_a_graph_has(graphs):
    graph = onnx.load(graphs["int8"]).graph
    (config,) = (text for text in blocks("text") if "max_batch_size" in text)
    for (value,), kind, size in ((graph.input, "input", 3), (graph.output, "output", 1)):
        found = re.search(rf'{kind} {{ name: "(\w+)" data_type: TYPE_FP32 dims: \[([\d, ]+)\]', config)
        assert found[1] == value.name and len(found[2].split(",")) == size
        assert value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
        assert value.type.tensor_type.shape.dim[0].dim_param and len(value.type.tensor_type.shape.dim) == size + 1
    for text in (*blocks("cpp"), *blocks("python")[1:]):
        assert '"input"' in text and '"logits"' in text


@pytest.mark.parametrize("index", range(3))
def test_the_python_compiles(index):
    compile(blocks("python")[index], "after_export.md", "exec")
