"""The target inductor: what it refuses without a GPU; with one, that a package computes what the lowered model does."""

import contextlib
import io
import os
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch

from qswin.calib.files import write_with_sidecar
from qswin.qat.backends import inductor
from qswin.qat.checkpoint import Description, load_checkpoint, save_checkpoint
from qswin.qat.ptq.ranges import find_ranges
from qswin.qat.quant.recipe import named_recipe
from qswin.qat.quant.rewrite import quantize
from tests.helpers import DESCRIPTION, SIDECAR, SMALL, V1, fails, invoke, small_swin

HEADS_OF_32 = {**SMALL, "embed_dim": 64}  # the kernels' products are 32 deep


@pytest.fixture
def checkpoint(tmp_path, images):
    """A small Swin that was calibrated with the recipe of the kernels."""
    twin = quantize(small_swin(**HEADS_OF_32), named_recipe("attention"))
    find_ranges(twin, [images])
    description = Description(
        {"name": V1, "num_classes": 5, **HEADS_OF_32},
        "ptq",
        DESCRIPTION.preprocessing,
        DESCRIPTION.classes,
        named_recipe("attention"),
    )
    save_checkpoint(tmp_path / "ptq.safetensors", twin, description)
    return tmp_path / "ptq.safetensors"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_building_needs_a_gpu(checkpoint):
    with pytest.raises(ValueError, match="needs an NVIDIA GPU.*tensorrt-rtx"):
        inductor.build_package(checkpoint, "best", (4, 4, 4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fold", "--checkpoint", "x", "--engine", "x.pt2"], "--fold is not for --target inductor"),
        (["--precision", "fp16", "--checkpoint", "x", "--engine", "x.pt2"], "--precision fp16 is not for"),
        (["--onnx", "x", "--engine", "x.pt2"], "--onnx is not for --target inductor"),
        (["--level", "0", "--checkpoint", "x", "--engine", "x.pt2"], "--level is not for --target inductor"),
        (
            ["--timing-cache", "t", "--checkpoint", "x", "--engine", "x.pt2"],
            "--timing-cache is not for --target inductor",
        ),
        (
            ["--capability", "8.9", "--checkpoint", "x", "--engine", "x.pt2"],
            "--capability is not for --target inductor",
        ),
        (["--engine", "x.pt2"], "builds from --checkpoint FILE"),
        (["--checkpoint", "x", "--engine", "x.engine"], "--engine x.engine: the name must end in .pt2"),
    ],
)
def test_arguments_that_do_not_go_together(arguments, message, capsys):
    assert message in fails(capsys, "build", "--target", "inductor", *arguments)


def test_a_checkpoint_is_for_this_target_only(capsys):
    line = fails(capsys, "build", "--checkpoint", "x", "--engine", "x.engine")
    assert "--checkpoint is not for --target tensorrt" in line


@pytest.mark.parametrize(("key", "value"), [("capability", "8.6"), ("version", "1.0")])
def test_packages_of_other_machines_are_refused(tmp_path, monkeypatch, key, value):
    path = tmp_path / "x.pt2"
    built = {"target": "inductor", "version": torch.__version__, "capability": "9.0", "profile": [1, 1, 1]}
    write_with_sidecar(path, b"package", inductor.KIND, {**SIDECAR, **built, key: value})
    monkeypatch.setattr(inductor, "check_gpu", lambda precision: "9.0")
    with pytest.raises(ValueError, match=f"built .* {value}, here is"):
        inductor.Package(path)


def test_the_package_that_is_loaded_is_the_one_that_was_checked(tmp_path, monkeypatch):
    """Another file may stand under its name a moment later."""
    path, loaded = tmp_path / "x.pt2", []
    built = {"target": "inductor", "version": torch.__version__, "capability": "9.0", "profile": [1, 1, 1]}
    write_with_sidecar(path, b"package", inductor.KIND, {**SIDECAR, **built})
    monkeypatch.setattr(inductor, "check_gpu", lambda precision: path.write_bytes(b"another") and "9.0")
    monkeypatch.setattr(torch._inductor, "aoti_load_package", lambda file, **options: loaded.append(file.read()))
    inductor.Package(path)
    assert loaded == [b"package"]


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.parametrize("links", [True, False])
def test_a_library_with_its_own_cpp_library_is_refused(tmp_path, links):
    """Torch would end in a segmentation fault, seen with a g++ that links libstdc++ statically."""
    source, library = tmp_path / "x.cpp", tmp_path / "x.so"
    source.write_text('#include <string>\nextern "C" int f(const char* s) { return std::string(s).size(); }')
    static = [] if links else ["-static-libstdc++"]
    subprocess.run(["g++", "-shared", "-fPIC", *static, str(source), "-o", str(library)], check=True)
    package = io.BytesIO()
    with zipfile.ZipFile(package, "w") as archive:
        archive.write(library, "model/x.so")
    with (
        contextlib.nullcontext() if links else pytest.raises(ValueError, match="linked libstdc.. into the package.*CXX")
    ):
        inductor.check_linkage(package.getvalue())


COPIES = """
import ast
from torch._inductor.codegen.wrapper import user_defined_triton_kernel_transitive_closure_source_code as source_of
from tests.qat.kernels.compiled import kernels

for kernel, _, _ in kernels("*i8").values():
    compile(ast.literal_eval("'''" + source_of(kernel) + "'''"), "copy", "exec")
"""


def test_inductor_can_copy_the_kernels():
    """It writes their source, and constants that they name, into a string of its own: line breaks there ended it."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", COPIES], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("shapes", ["4", "1,2,4"])
def test_a_package_computes_what_the_lowered_model_does(checkpoint, images, shapes, tmp_path):
    from qswin.qat.lowering.lower import lower

    engine = tmp_path / "int8.pt2"
    assert (
        invoke("build", "--target", "inductor", "--checkpoint", checkpoint, "--engine", engine, "--batch-sizes", shapes)
        == 0
    )
    package = inductor.Package(engine)
    model, _ = load_checkpoint(checkpoint)
    lowered = lower(model.cuda(), images[:1].cuda(), torch.float16)
    for batch in (4, 3):
        with torch.inference_mode():
            expected = lowered(images[:batch].cuda().half()).float().cpu().numpy()
        np.testing.assert_allclose(package(images[:batch].numpy()), expected, atol=0.02 * np.abs(expected).max())
    assert invoke("bench", "--model", engine, "--batch-sizes", "4", "--repeats", "3", "--cuda-graph") == 0
