"""The model repository: its configs, read by the server's own schema where that is installed."""

from pathlib import Path

import pytest

from tests.helpers import fails, invoke
from tests.trt.package.conftest import LABELS, save_built, save_graph

WANTED = "tritonclient, which brings the server's schema, is not installed"


@pytest.fixture(scope="module")
def schema():
    """The server's model_config.proto, as its client brings it."""
    return pytest.importorskip("tritonclient.grpc.model_config_pb2", reason=WANTED, exc_type=ImportError)


@pytest.fixture(scope="module")
def parse(schema):
    from google.protobuf import text_format

    return lambda folder: text_format.Parse((folder / "config.pbtxt").read_text(), schema.ModelConfig())


def repository(run: Path, tmp_path: Path, *only: str) -> Path:
    arguments = ("--only", *only) if only else ()
    assert invoke("package", run, "--out", tmp_path / "deploy", "--triton", *arguments) == 0
    return tmp_path / "deploy" / "models"


def test_the_folders(run, tmp_path):
    models = repository(run, tmp_path)
    names = ["int8_engine", "int8_onnx", "int8_pt2"]  # Triton runs no bundles
    assert {path.name for path in models.iterdir()} == {f"{n}{end}" for n in names for end in ENDS}
    for name, file, source in zip(names, ("plan", "onnx", "pt2"), ("engine", "onnx", "pt2"), strict=True):
        found = {str(path.relative_to(models / name)) for path in (models / name).rglob("*") if path.is_file()}
        assert found == {"config.pbtxt", "labels.txt", f"1/model.{file}"}
        assert (models / name / "1" / f"model.{file}").read_bytes() == (run / f"int8.{source}").read_bytes()
        assert (models / name / "labels.txt").read_text("utf-8").splitlines() == LABELS
        step = models / f"{name}_preprocess" / "1"
        assert {path.name for path in step.iterdir()} == {"model.py", "preprocess.py", "preprocessing.json"}
        assert (models / f"{name}_ensemble" / "1").is_dir()
    text = (models.parent / "README.md").read_text()
    assert "Triton has no backend for int8.qsb" in text and "--build-arg TRITON=XX.YY-py3" in text


ENDS = ("", "_preprocess", "_ensemble")


@pytest.mark.parametrize(
    ("file", "changes", "platform", "most", "batch"),
    [
        ("a.onnx", {}, "onnxruntime_onnx", 64, None),
        ("a.onnx", {"batch": 4}, "onnxruntime_onnx", 0, 4),
        ("a.engine", {}, "tensorrt_plan", 16, None),
        ("a.plan", {"profile": [8, 8, 8]}, "tensorrt_plan", 0, 8),
        ("a.engine", {"profile": [2, 4, 8]}, "tensorrt_plan", 0, -1),
        ("a.engine", {"profile": [1, 4, 8], "batch_sizes": [1, 8], "plugin": "q.so"}, "tensorrt_plan", 0, -1),
        ("a.pt2", {}, "torch_aoti", 0, -1),
        ("a.pt2", {"profile": [64, 64, 64]}, "torch_aoti", 0, 64),
    ],
)
def test_the_configs(parse, schema, tmp_path, file, changes, platform, most, batch):
    path = tmp_path / "run" / file
    path.parent.mkdir()
    (save_graph if path.suffix == ".onnx" else save_built)(path, **changes)
    models, name = repository(path.parent, tmp_path), file.replace(".", "_")
    model, step, ensemble = (parse(models / f"{name}{end}") for end in ENDS)
    for config, end in zip((model, step, ensemble), ENDS, strict=True):
        assert config.name == f"{name}{end}" and config.max_batch_size == most
    held = [] if batch is None else [batch]
    assert model.platform == platform and model.backend == platform.replace("torch_aoti", "pytorch").split("_")[0]
    assert shape(model.input, schema.TYPE_FP32) == [*held, 3, 24, 24]
    assert shape(model.output, schema.TYPE_FP32) == [*held, len(LABELS)]
    assert model.output[0].label_filename == "labels.txt"
    assert model.HasField("dynamic_batching") == (most > 0)
    assert shape(step.input, schema.TYPE_STRING) == shape(ensemble.input, schema.TYPE_STRING) == (held or [1])
    assert step.backend == "python" and shape(step.output, schema.TYPE_FP32) == [*held, 3, 24, 24]
    assert ensemble.platform == "ensemble" and shape(ensemble.output, schema.TYPE_FP32) == [*held, len(LABELS)]
    check_flow(ensemble, {config.name: config for config in (model, step)})
    readme = (models.parent / "README.md").read_text()
    assert ("--backend-config=tensorrt,plugins=/path/of/q.so" in readme) == ("plugin" in changes)


def shape(tensors, data_type):
    (tensor,) = tensors
    assert tensor.data_type == data_type
    return list(tensor.dims)


def check_flow(ensemble, steps):
    """Each tensor that a step takes is the ensemble's input or was given before; the last gives its output."""
    known = {tensor.name: tensor.data_type for tensor in ensemble.input}
    for step in ensemble.ensemble_scheduling.step:
        config = steps[step.model_name]
        assert step.model_version == -1 and set(step.input_map) == {tensor.name for tensor in config.input}
        assert all(known[step.input_map[tensor.name]] == tensor.data_type for tensor in config.input)
        known |= {step.output_map[tensor.name]: tensor.data_type for tensor in config.output}
    assert {tensor.name for tensor in ensemble.output} <= set(known)


def test_names_are_the_servers(parse, tmp_path):
    save_graph(tmp_path / "run" / 'a "b" é.v2.onnx')
    models = repository(tmp_path / "run", tmp_path)
    assert parse(models / "a__b____v2_onnx").name == "a__b____v2_onnx"


def test_engines_of_rtx_and_names_that_meet_are_refused(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    save_built(tmp_path / "run" / "a.engine", target="tensorrt-rtx", gpu=None)
    line = fails(capsys, "package", tmp_path / "run", "--out", tmp_path / "out", "--triton")
    assert "Triton serves ONNX files, engines of TensorRT and packages" in line
    for name in ("a b.onnx", "a_b.onnx"):
        save_graph(tmp_path / "run" / name)
    line = fails(capsys, "package", tmp_path / "run", "--out", tmp_path / "out", "--triton")
    assert "two files would be the model 'a_b_onnx'" in line and not (tmp_path / "out").exists()
