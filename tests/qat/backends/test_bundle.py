"""The target bundle and its files: built from a checkpoint, evaluated and timed without a GPU, and what is refused."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from qswin.calib.files import read_sidecar  # noqa: E402
from qswin.qat.backends import bundle as backend  # noqa: E402
from qswin.qat.backends.registry import OpenOptions, open_predictor  # noqa: E402
from qswin.qat.bundle import build, runner  # noqa: E402
from qswin.qat.bundle.reader import read_bundle  # noqa: E402
from qswin.qat.checkpoint import Description, load_checkpoint, save_checkpoint  # noqa: E402
from qswin.qat.lowering.lower import lower  # noqa: E402
from qswin.qat.quant.recipe import named_recipe  # noqa: E402
from tests.helpers import DESCRIPTION, SMALL, V1, fails, invoke, twin_of, write_images  # noqa: E402
from tests.qat.bundle.small import no_code  # noqa: E402

CPU = OpenOptions(device="cpu")
HEADS_OF_32 = {**SMALL, "embed_dim": 64}  # the kernels' products are 32 deep


def save(path, images, recipe, **settings):
    """Writes the checkpoint of a small Swin that was calibrated with a recipe of the kernels."""
    settings = {**SMALL, **settings}
    model = {"name": V1, "num_classes": 5, **settings}
    described = (DESCRIPTION.preprocessing, DESCRIPTION.classes, named_recipe(recipe))
    save_checkpoint(path, twin_of(images, recipe, **settings), Description(model, "ptq", *described))
    return path


@pytest.fixture
def checkpoint(tmp_path, images):
    return save(tmp_path / "ptq.safetensors", images, "attention")


@pytest.fixture
def without_compiler(monkeypatch):
    """Kernels are interpreted here, and cannot be compiled."""

    def no_cubins(functions, kernels, arch):
        return tuple(no_code(index, "p") for index in range(len(kernels)))

    monkeypatch.setattr(build, "compile_all", no_cubins)


def build_file(checkpoint, path, *options):
    assert invoke("build", "--target", "bundle", "--checkpoint", checkpoint, "--engine", path, *options) == 0
    return path


def test_a_bundle_computes_what_the_lowered_model_does(checkpoint, images, tmp_path, without_compiler):
    path = build_file(checkpoint, tmp_path / "x.qsb", "--batch-sizes", "4,1", "--arch", "90,80")
    predictor = open_predictor(path, CPU)
    lowered = lower(load_checkpoint(checkpoint)[0], images[:1], torch.float16)
    assert predictor.batch_sizes == [1, 4] and predictor.batch_size == 4
    for count in (1, 3, 4):
        with torch.inference_mode():
            expected = lowered(images[:count]).numpy()
        assert np.array_equal(predictor(images[:count].numpy()), expected)
    with pytest.raises(ValueError, match="batch 5: the bundle takes up to 4"):
        predictor(np.zeros((5, 3, 32, 32), dtype=np.float32))


def test_the_sidecar_says_what_it_holds(checkpoint, tmp_path, without_compiler):
    path = build_file(checkpoint, tmp_path / "x.qsb", "--batch-sizes", "2", "--json", tmp_path / "x.json")
    sidecar = read_sidecar(path, "bundle", ("target", "parent"), "")
    assert sidecar["architectures"] == [80, 86, 89, 90] and sidecar["batch_sizes"] == [2]
    assert sidecar["engine_precision"] == "int8" and sidecar["target"] == "bundle"
    manifest = read_bundle(path.read_bytes()).manifest
    assert manifest.model["parent"] == sidecar["parent"] and "seconds" not in manifest.model
    assert json.loads((tmp_path / "x.json").read_text())["kind"] == "build"


def test_the_same_checkpoint_gives_the_same_bytes(checkpoint, tmp_path, without_compiler):
    files = [build_file(checkpoint, tmp_path / name, "--arch", "80") for name in ("a.qsb", "b.qsb")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.slow
def test_commands_take_it_as_any_model(checkpoint, tmp_path, without_compiler, capsys):
    path = build_file(checkpoint, tmp_path / "x.qsb", "--batch-sizes", "1,4")
    data = write_images(tmp_path / "data", each=2) / "val"
    result = tmp_path / "r.json"
    assert invoke("evaluate", "--model", path, "--data", data, "--device", "cpu", "--json", result) == 0
    values = json.loads(result.read_text())
    assert values["images"] == 10 and values["backend"] == "bundle, interpreted" and values["precision"] == "int8"
    timed = tmp_path / "t.json"
    options = ("--batch-sizes", "1,2,4", "--device", "cpu", "--repeats", "1", "--warmup", "0")
    assert invoke("bench", "--model", path, *options, "--json", timed) == 0
    assert [row["batch"] for row in json.loads(timed.read_text())["rows"]] == [1, 4]


def test_its_launches_are_listed(checkpoint, tmp_path, without_compiler, capsys):
    path = build_file(checkpoint, tmp_path / "x.qsb", "--batch-sizes", "1,4")
    capsys.readouterr()
    assert invoke("inspect", "--model", path, "--json", tmp_path / "l.json") == 0
    layers = json.loads((tmp_path / "l.json").read_text())["layers"]
    assert "34 layers" in capsys.readouterr().out and len(layers) == 34
    assert layers[0]["kind"] == "patch_embed" and layers[0]["name"] == "_patch_embed_kernel 16x1x1"
    assert layers[0]["inputs"][0] == "fp32" and layers[0]["outputs"] == ["fp16"]
    assert layers[-1]["kind"] == "linear_float" and layers[-1]["inputs"][0] == "int8"
    assert "--time is for engines; qswin bench times a bundle" in fails(capsys, "inspect", "--model", path, "--time")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arch", "80,70"], "--arch '70': give some of 80,86,89,90,100,120"),
        (["--arch", ""], "--arch ''"),
        (["--batch-sizes", "0"], "--batch-sizes '0'"),
        (["--precision", "fp16"], "--precision fp16 is not for --target bundle"),
        (["--level", "0"], "--level is not for --target bundle"),
        (["--capability", "8.9"], "--capability is not for --target bundle"),
        (["--engine", "x.pt2"], "the name must end in .qsb"),
    ],
)
def test_arguments_that_do_not_go_together(arguments, message, capsys):
    given = ("--target", "bundle", "--checkpoint", "x", "--engine", "x.qsb", *arguments)
    assert message in fails(capsys, "build", *given)


def test_arch_is_of_bundles_only(capsys):
    line = fails(capsys, "build", "--onnx", "x.onnx", "--engine", "x.engine", "--arch", "80")
    assert "--arch is not for --target tensorrt" in line


def test_fp8_needs_an_architecture_that_has_it(images, tmp_path, without_compiler, capsys):
    checkpoint = save(tmp_path / "fp8.safetensors", images, "attention-fp8")
    given = ("--target", "bundle", "--checkpoint", checkpoint, "--engine", tmp_path / "x.qsb")
    assert "--arch 80: fp8 needs 89 or newer" in fails(capsys, "build", *given, "--arch", "80,90")
    assert "quantized to fp8, not int8" in fails(capsys, "build", *given, "--precision", "int8", "--arch", "90")
    predictor = open_predictor(build_file(checkpoint, tmp_path / "x.qsb"), CPU)
    assert predictor.precision == "fp8" and list(predictor.bundle.code) == [89, 90]


def test_a_sites_recipe_that_the_kernels_lack_is_refused(images, tmp_path, capsys):
    checkpoint = save(tmp_path / "full.safetensors", images, "full")
    line = fails(
        capsys,
        "build",
        "--target",
        "bundle",
        "--checkpoint",
        checkpoint,
        "--engine",
        tmp_path / "x.qsb",
        "--arch",
        "80",
    )
    assert "add1 is quantized; the kernels add in float: calibrate with recipe=attention" in line


def test_without_the_runner_it_says_how_to_build_it(checkpoint, tmp_path, without_compiler, monkeypatch, capsys):
    path = build_file(checkpoint, tmp_path / "x.qsb", "--batch-sizes", "1")
    monkeypatch.setenv(runner.VARIABLE, str(tmp_path / "libqswin.so"))
    runner.library.cache_clear()
    line = fails(capsys, "evaluate", "--model", path, "--data", tmp_path)
    assert "needs libqswin.so, which is not found" in line and "cmake -S cpp -B cpp/build" in line
    assert backend.BACKEND.findings()[0].found is None


def test_a_damaged_bundle_is_one_line(checkpoint, tmp_path, without_compiler, capsys):
    path = build_file(checkpoint, tmp_path / "x.qsb", "--batch-sizes", "1")
    for data, message in (
        (path.read_bytes()[:-5], "cut off, or changed"),
        (b"PK", "not a bundle"),
        (b"", "not a bundle"),
    ):
        path.write_bytes(data)
        line = fails(capsys, "evaluate", "--model", path, "--data", tmp_path, "--device", "cpu")
        assert message in line and "x.qsb" in line


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "arch"), [("attention", "80"), ("attention-fp8", "90")])
def test_a_whole_build(images, tmp_path, recipe, arch):
    """Compiled, in a process of its own, whose kernels are not interpreted."""
    checkpoint = save(tmp_path / "x.safetensors", images, recipe, **HEADS_OF_32)
    command = ["build", "--target", "bundle", "--checkpoint", checkpoint, "--engine", tmp_path / "x.qsb"]
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    options = ["--arch", arch, "--batch-sizes", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "qswin", *command, *options], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    cubins = read_bundle((tmp_path / "x.qsb").read_bytes()).code[int(arch)]
    assert {cubin.function for cubin in cubins} >= {"_linear_kernel", "_attention_kernel", "_patch_embed_kernel"}
    assert all(len(cubin.code) > 3000 for cubin in cubins)
    predictor = open_predictor(tmp_path / "x.qsb", CPU)
    assert predictor(images[:1].numpy()).shape == (1, 5)
