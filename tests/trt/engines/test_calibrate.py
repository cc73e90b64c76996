"""The command that makes calibration caches, offline; with TensorRT it says what is missing."""

import importlib.util
import json

import pytest

from qswin.calib.files import sha256, sidecar_path
from qswin.calib.trt_cache.cache_file import parse_cache, read_cache
from qswin.trt.engines import calibrate
from qswin.trt.graphs.files import read_onnx
from tests.helpers import fails, invoke


@pytest.mark.slow
def test_an_offline_cache_is_bound_to_its_graph(graphs, data, tmp_path):
    cache, onnx = tmp_path / "a.cache", graphs["fp32"]
    common = ["--onnx", onnx, "--data", data / "train", "--cache", cache, "--batch-size", 4, "--offline"]
    assert invoke("calib-cache", *common, "--images", 99) == 0
    ranges = parse_cache(read_cache(cache, "8.6.0", sha256(onnx)))[2]
    outputs = {name for node in read_onnx(onnx).graph.node for name in node.output}
    assert set(ranges) <= outputs | {"input"} and {"input", "logits"} <= set(ranges)
    sidecar = json.loads(sidecar_path(cache).read_text())
    assert sidecar["offline"] is True and sidecar["images"] == 20  # all that there are


def test_the_checksum_is_of_the_graph_that_was_read(graphs, data, tmp_path, monkeypatch):
    """Another job writes the file again while the cache is made."""
    onnx, before = tmp_path / "a.onnx", graphs["fp32"].read_bytes()
    onnx.write_bytes(before)

    def meanwhile(*args, **settings):
        onnx.write_bytes(b"another graph")
        return {"input": 1.0}

    monkeypatch.setattr(calibrate, "activation_ranges", meanwhile)
    made = calibrate.CacheOptions(images=2, workers=0, offline_for="8.6.0")
    calibrate.make_cache(onnx, data / "train", tmp_path / "a.cache", made)
    assert read_cache(tmp_path / "a.cache", "8.6.0", sha256(graphs["fp32"]))


def test_the_same_seed_gives_the_same_cache_in_other_batches(graphs, data, tmp_path):
    common = ["--onnx", graphs["fp32"], "--data", data / "train", "--images", 6, "--offline", "--algorithm", "minmax"]
    for name, batch in (("a", 4), ("b", 3)):
        assert invoke("calib-cache", *common, "--cache", tmp_path / f"{name}.cache", "--batch-size", batch) == 0
    caches = (read_cache(tmp_path / f"{name}.cache", "8.6.0", sha256(graphs["fp32"])) for name in "ab")
    first, second = (parse_cache(cache)[2] for cache in caches)
    assert first == pytest.approx(second, rel=1e-4)


@pytest.mark.slow
def test_unreadable_images_are_skipped_where_that_is_asked_for(graphs, data, tmp_path, capsys):
    (bad := data / "train" / "class0" / "0.png").write_bytes(b"no image")
    cache = tmp_path / "a.cache"
    common = ["--onnx", graphs["fp32"], "--data", data / "train", "--cache", cache, "--workers", 0, "--offline"]
    assert f"{bad}: missing, or cannot be read" in (line := fails(capsys, "calib-cache", *common))
    assert "--skip-unreadable" in line and not cache.exists()
    assert invoke("calib-cache", *common, "--skip-unreadable", "--json", tmp_path / "r.json") == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["kind"] == "calibration cache report" and report["images"] == 19


def test_a_cache_is_not_written_over_a_file_of_another_kind(graphs, data, tmp_path, capsys):
    common = ["--onnx", graphs["fp32"], "--data", data / "train", "--offline", "--cache"]
    (graph := tmp_path / "a.onnx").write_bytes(b"graph")
    assert "the name must end in .cache" in fails(capsys, "calib-cache", *common, graph)
    sidecar_path(tmp_path / "a.cache").write_text('{"kind": "evaluation"}')
    assert "choose another name" in fails(capsys, "calib-cache", *common, tmp_path / "a.cache")
    assert graph.read_bytes() == b"graph" and not (tmp_path / "a.cache").exists()


def test_what_cannot_be_calibrated_says_why(graphs, data, tmp_path, capsys):
    def says(graph, *more):
        arguments = ["--onnx", graphs[graph], "--data", data / "train", "--cache", tmp_path / "a.cache", *more]
        assert invoke("calib-cache", *arguments) == 2 and not (tmp_path / "a.cache").exists()
        return capsys.readouterr().err

    assert "has Q/DQ nodes, whose ranges are in the graph" in says("int8", "--offline")
    for version in ("8.6", "x", "8..0"):
        line = says("fp32", "--offline", "--tensorrt-version", version)
        assert f"TensorRT's version '{version}' is not one; give three numbers, such as 8.6.0" in line
    assert "0 images to calibrate on" in says("fp32", "--offline", "--images", 0)
    if importlib.util.find_spec("tensorrt") is None:
        assert "tensorrt is not installed" in says("fp32")
