"""TensorRT-RTX takes every graph that is exported, on a CPU; what cannot be built says why and what can."""

import hashlib
import json

import numpy as np
import onnx
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qswin.calib.files import sha256, sidecar_path
from qswin.calib.trt_cache.cache_file import BoundTo, format_cache, write_cache
from qswin.calib.trt_cache.offline import activations
from qswin.qat.export.onnx_export import export_onnx, save_onnx
from qswin.qat.ptq.ranges import find_ranges
from qswin.qat.quant.recipe import named_recipe
from qswin.qat.quant.rewrite import quantize
from qswin.trt.engines import build as engine_build
from qswin.trt.engines import options as engine_options
from qswin.trt.engines.build import build_engine, fold_constants
from qswin.trt.engines.network import with_tf32
from qswin.trt.engines.options import BuildOptions, check_possible, parse_bytes, parse_profile
from qswin.trt.engines.version import TensorRT, capabilities, find_tensorrt
from qswin.trt.graphs.files import read_onnx, with_batch
from qswin.trt.graphs.runtime import OnnxRuntimePredictor
from tests.helpers import DESCRIPTION, V2, invoke, scale_channels, small_swin

TENSORRT86 = TensorRT("tensorrt", "8.6.0", capabilities("tensorrt", "8.6.0"))
TENSORRT11 = TensorRT("tensorrt", "11.0.0", capabilities("tensorrt", "11.0.0"))


SLOW = pytest.mark.slow


@pytest.fixture
def rtx() -> None:
    pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed")


@pytest.mark.parametrize(
    ("graph", "precision", "overrides"),
    [
        pytest.param("fp32", "fp32", (), marks=SLOW),
        pytest.param("fp32", "tf32", (), marks=SLOW),
        ("fp32", "fp16", ("swin-fp16",)),
        pytest.param("fp16", "fp16", (), marks=SLOW),
        ("int8", "int8", ("Softmax=fp32",)),
        pytest.param("int8-17", "best", (), marks=SLOW),
        pytest.param("int8-batch2", "int8", (), marks=SLOW),
        pytest.param("int8-scaled", "int8", (), marks=SLOW),
        pytest.param("int8-scaled", "best", (), marks=SLOW),
        pytest.param("fp8", "fp8", (), marks=SLOW),
        pytest.param("fp8", "best", (), marks=SLOW),
        pytest.param("int8-scaled-17", "best", (), marks=SLOW),
    ],
)
def test_every_graph_builds(rtx, graphs, graph, precision, overrides):
    options = BuildOptions(precision=precision, target="tensorrt-rtx", batch_sizes=(1, 2, 4), override=overrides)
    engine, sidecar = build_engine(graphs[graph], options)
    assert len(engine) > 100_000
    assert sidecar["profile"] == ((2, 2, 2) if graph == "int8-batch2" else (1, 2, 4))
    assert sidecar["onnx_sha256"] == sha256(graphs[graph]) and sidecar["classes"] == list(DESCRIPTION.classes)


@pytest.mark.slow
def test_the_checksums_are_of_what_was_read(graphs, tmp_path, monkeypatch):
    """Another job writes the graph and the cache again while the engine is built."""
    onnx, cache = tmp_path / "a.onnx", tmp_path / "a.cache"
    content = format_cache({"input": 2.0}, "8.6.0", "entropy2")
    write_cache(cache, content, BoundTo("a.onnx", sha256(graphs["fp32-17"])), {})
    onnx.write_bytes(graphs["fp32-17"].read_bytes())

    def meanwhile(path, model, options, tensorrt, overrides, calibrator):
        onnx.write_bytes(b"another graph")
        cache.write_bytes(b"another cache")
        assert calibrator == content
        return b"engine", (1, 1, 1)

    monkeypatch.setattr(engine_options, "find_gpu", lambda: object())
    monkeypatch.setattr(engine_build, "find_gpu", lambda: None)
    monkeypatch.setattr(engine_build, "find_tensorrt", lambda target: TENSORRT86)
    monkeypatch.setattr(engine_build, "make_calibrator", lambda algorithm, cache: cache)
    monkeypatch.setattr(engine_build, "build_network", meanwhile)
    _, sidecar = build_engine(onnx, BuildOptions(precision="int8", calib_cache=cache))
    assert sidecar["onnx_sha256"] == sha256(graphs["fp32-17"])
    assert sidecar["calib_cache_sha256"] == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("tf32", [True, False])
def test_tf32_is_what_was_asked_for(rtx, tf32):
    import tensorrt_rtx_bindings as tensorrt

    find_tensorrt("tensorrt-rtx")
    config = tensorrt.Builder(tensorrt.Logger(tensorrt.Logger.ERROR)).create_builder_config()
    with_tf32(lambda builder, network: config, tf32)(None, None)
    assert config.get_flag(tensorrt.BuilderFlag.TF32) is tf32


SCALED = ("qkv", "fc1", "fc2", "reduction", "head.fc")


@SLOW
@pytest.mark.parametrize("scaled", [(), SCALED], ids=["", "channel scales"])
def test_swin_v2_builds(rtx, tmp_path, images, scaled):
    twin = quantize(small_swin(V2), named_recipe("full"))
    find_ranges(twin, [images])
    scale_channels(twin, images, *scaled)
    save_onnx(tmp_path / "a.onnx", export_onnx(twin, DESCRIPTION, "int8", batch=2), DESCRIPTION.to_dict())
    engine, _ = build_engine(tmp_path / "a.onnx", BuildOptions(precision="int8", target="tensorrt-rtx"))
    assert len(engine) > 100_000


@pytest.mark.parametrize("kind", ["int8", pytest.param("int8-scaled", marks=SLOW)])
def test_folding_changes_no_result(graphs, kind):
    pytest.importorskip("onnx_graphsurgeon", reason="ONNX-GraphSurgeon is not installed")
    images = np.random.default_rng(0).standard_normal((2, 3, 32, 32), dtype=np.float32)
    folded = graphs[kind].with_name("folded.onnx")
    onnx.save(fold_constants(onnx.load(graphs[kind])), folded)
    np.testing.assert_allclose(
        OnnxRuntimePredictor(folded)(images), OnnxRuntimePredictor(graphs[kind])(images), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize(
    ("graph", "options", "message"),
    [
        ("int8", {"precision": "fp16"}, "has Q/DQ nodes; build it as int8, fp8 or best"),
        ("int8", {"precision": "fp8"}, "has no FP8 Q/DQ nodes; calibrate with recipe=attention-fp8"),
        pytest.param("fp8", {"precision": "int8"}, "its Q/DQ nodes are FP8; build it as fp8 or best", marks=SLOW),
        pytest.param(
            "fp8",
            {"precision": "fp8", "capability": "8.6"},
            "FP8 needs compute capability 8.9 or newer, not 8.6",
            marks=SLOW,
        ),
        pytest.param("uint8", {"precision": "int8"}, "unsigned levels, which TensorRT-RTX .* lacks", marks=SLOW),
        ("fp32", {"precision": "int8"}, "has no Q/DQ nodes; export with --precision int8"),
        ("fp16", {"precision": "fp32"}, "its weights are FP16"),
        ("fp32", {"precision": "int4"}, "precision 'int4' is not known; choose fp32"),
        ("fp32", {"capability": "9.0"}, "compute capability 9.0: TensorRT-RTX .* builds for 7.5, .*--target tensorrt"),
        ("fp32", {"override": ("nothing=fp32",)}, "matches nothing"),
        ("fp32", {"precision": "fp32", "override": ("Softmax=fp16",)}, "--override is for --precision fp16"),
        (
            "fp32",
            {"precision": "int8", "calib_cache": "x.cache"},
            "--calib-cache is not for --target tensorrt-rtx, which has no implicit INT8",
        ),
    ],
)
def test_what_cannot_be_built_says_what_can(rtx, graphs, graph, options, message):
    with pytest.raises(ValueError, match=message):
        build_engine(graphs[graph], BuildOptions(**{"target": "tensorrt-rtx", **options}))


def test_versions_refuse_what_they_lack(graphs, monkeypatch):
    model = read_onnx(graphs["fp32"])
    with pytest.raises(ValueError, match="opset 20, but TensorRT 8.6.0 takes 17 at most; qswin export --opset 17"):
        check_possible(graphs["fp32"], model, BuildOptions(), TENSORRT86)
    monkeypatch.setattr(engine_options, "find_gpu", lambda: None)
    with pytest.raises(ValueError, match="builds on a GPU, and there is none here; --target tensorrt-rtx"):
        check_possible(graphs["int8-17"], read_onnx(graphs["int8-17"]), BuildOptions(), TENSORRT86)
    monkeypatch.setattr(engine_options, "find_gpu", lambda: object())
    with pytest.raises(ValueError, match="TensorRT 11.0.0 has no implicit INT8"):
        check_possible(graphs["fp32"], model, BuildOptions(calib_cache=graphs["fp32"]), TENSORRT11)


def test_files_that_are_no_graphs_say_so(rtx, tmp_path):
    (tmp_path / "a.onnx").write_bytes(b"no model")
    for name, error in (("a.onnx", ValueError), ("b.onnx", FileNotFoundError)):
        with pytest.raises(error, match=name):
            build_engine(tmp_path / name, BuildOptions(target="tensorrt-rtx"))


def test_the_command_writes_an_engine_and_its_sidecar(rtx, graphs, tmp_path):
    engine = tmp_path / "deep" / "int8.engine"
    arguments = [
        "--onnx",
        str(graphs["int8"]),
        "--engine",
        str(engine),
        "--target",
        "tensorrt-rtx",
        "--precision",
        "int8",
    ]
    assert invoke("build", *arguments, "--batch-sizes", "1,2,4", "--json", tmp_path / "r.json") == 0
    sidecar = json.loads(sidecar_path(engine).read_text())
    assert sidecar["kind"] == "engine" and sidecar["sha256"] == sha256(engine) and sidecar["engine_precision"] == "int8"
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["kind"] == "build" and result["onnx_sha256"] == sha256(graphs["int8"])


def test_profiles_and_sizes():
    assert parse_profile("1,16,64") == (1, 16, 64) and parse_profile("64") == (64, 64, 64)
    assert (parse_bytes("4GiB"), parse_bytes("512MiB"), parse_bytes("7")) == (4 << 30, 512 << 20, 7)
    for wrong in ("", "1,2", "0", "4,2,1", "a", "1000000000000"):
        with pytest.raises(ValueError, match="smallest, usual and largest"):
            parse_profile(wrong)


@given(st.text(max_size=8))
@example("²")  # a digit, but no decimal one
def test_any_text_is_a_size_or_an_error(text):
    try:
        assert parse_bytes(text) >= 0
    except ValueError as error:
        assert "is not a size" in str(error)


@pytest.mark.parametrize("graph", ["fp32-17", "int8-17"])
def test_one_shape_is_a_fixed_batch(rtx, graphs, graph):
    model = read_onnx(graphs[graph])
    fixed = with_batch(model, 3)
    assert [value.type.tensor_type.shape.dim[0].dim_value for value in (*fixed.graph.input, *fixed.graph.output)] == [
        3,
        3,
    ]
    images = np.random.default_rng(0).standard_normal((3, 3, 32, 32), dtype=np.float32)
    # Node by node: ONNX Runtime fuses the two to other products, float or integer, where the batch is known.
    runs = [activations("graph", m, ["logits"], images)["logits"] for m in (model, fixed)]
    np.testing.assert_array_equal(*runs)
    options = BuildOptions(precision="best", target="tensorrt-rtx", batch_sizes=(3, 3, 3))
    assert build_engine(graphs[graph], options)[1]["profile"] == (3, 3, 3)
