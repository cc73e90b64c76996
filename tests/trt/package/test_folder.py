"""What is in a package, and what is refused: one line, and nothing left behind."""

import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qswin.trt.package.folder import TEMPLATES
from tests.helpers import fails, invoke
from tests.trt.package.conftest import LABELS, description, save_built, save_graph

ROOT = Path(__file__).resolve().parents[3]
RESULTS = {
    "accuracy": {"kind": "evaluation", "model": "runs/x/int8.onnx", "backend": "onnxruntime 1.32.0", "acc1": 81.25}
    | {"acc1_error": 1.234, "precision": "int8", "images": 400},
    "other": {"kind": "evaluation", "model": "runs/x/fp32.onnx", "acc1": 12.34},
    "bench": {
        "kind": "timing",
        "rows": [
            {"model": "int8.engine", "backend": "tensorrt 8.6.1", "precision": "int8", "batch": 8, "ms": 1.5}
            | {"images_per_second": 5333.25, "device": "NVIDIA L4"}
        ],
    },
}


def test_what_is_in_it(run, tmp_path):
    for name, values in RESULTS.items():
        (run / f"{name}.json").write_text(json.dumps(values))
    out, said = tmp_path / "deep" / "deploy", tmp_path / "said.json"
    assert invoke("package", run, "--out", out, "--json", said) == 0
    written = json.loads(said.read_text())
    models = ["int8.engine", "int8.onnx", "int8.pt2", "int8.qsb"]
    assert (written["kind"], written["models"], written["triton"]) == ("deployment", models, False)
    programs = ["client.py", "preprocess.py", "main.cpp", "CMakeLists.txt", "Dockerfile", "Dockerfile.bundle"]
    sidecars = [f"{name}.json" for name in models if name != "int8.onnx"]
    expected = {*models, *sidecars, *programs, "labels.txt", "preprocessing.json", "README.md"}
    assert {path.name for path in out.iterdir()} == expected
    assert all((out / name).read_bytes() == (run / name).read_bytes() for name in (*models, *sidecars))
    assert (out / "labels.txt").read_text("utf-8").splitlines() == LABELS
    how = json.loads((out / "preprocessing.json").read_text())
    assert how == {"kind": "preprocessing", "channels": "RGB"} | json.loads(json.dumps(description()["preprocessing"]))
    readme = (out / "README.md").read_text()
    for words in ("81.25 | 1.23", "5333", "tensorrt 8.6.1, NVIDIA L4, compute capability 8.9", "1 to 16", "1, 4"):
        assert words in readme
    assert "12.34" not in readme and "triton" not in readme.lower()
    assert not list(out.parent.glob(".*"))


def test_of_one_file_only_what_it_needs(run, tmp_path):
    assert invoke("package", run, "--out", tmp_path / "a", "--only", "int8.onnx") == 0
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert not names & {"main.cpp", "Dockerfile.bundle", "int8.qsb"} and "Dockerfile" in names
    assert "The run holds no results of these files" in (tmp_path / "a" / "README.md").read_text()
    assert invoke("package", run, "--out", tmp_path / "b", "--only", "int8.qsb") == 0
    assert not (tmp_path / "b" / "Dockerfile").exists() and (tmp_path / "b" / "main.cpp").is_file()


def test_tags_are_pinned_and_placeholders_filled(run, tmp_path):
    assert invoke("package", run, "--out", tmp_path / "a", "--triton") == 0
    base = next(line for line in (ROOT / "Dockerfile").read_text().splitlines() if line.startswith("FROM"))
    for name in ("Dockerfile", "Dockerfile.bundle", "Dockerfile.triton"):
        text = (tmp_path / "a" / name).read_text()
        tags = [line.split()[1].partition(":")[2] for line in text.splitlines() if line.startswith("FROM")]
        assert all(tag not in ("", "latest") for tag in tags)
        assert not [key for key in ("{numpy}", "{pillow}", "{onnxruntime}", "{bundle}") if key in text]
    assert base in (tmp_path / "a" / "Dockerfile").read_text()


def test_classes_without_names_are_numbers(tmp_path):
    save_graph(tmp_path / "run" / "a.onnx", classes=None)
    save_built(tmp_path / "run" / "a.engine", classes=None)
    assert invoke("package", tmp_path / "run", "--out", tmp_path / "out") == 0
    assert (tmp_path / "out" / "labels.txt").read_text() == "0\n1\n2\n"


def test_programs_are_clean_python(tmp_path):
    for template in TEMPLATES.glob("*.py.in"):
        shutil.copyfile(template, tmp_path / template.stem)
    checked = [sys.executable, "-m", "ruff", "check", "--isolated", "--line-length", "120", str(tmp_path)]
    done = subprocess.run(checked, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_what_is_refused(run, tmp_path, capsys):
    out = tmp_path / "out"

    def says(*arguments):
        line = fails(capsys, "package", *arguments)
        assert not out.exists() and not list(tmp_path.glob(".out*"))
        return line

    empty = tmp_path / "empty"
    empty.mkdir()
    assert f"{tmp_path / 'none'}: no such folder" in says(tmp_path / "none", "--out", out)
    assert "nothing to package" in says(empty, "--out", out)
    assert "int9.onnx: no such model file" in says(run, "--out", out, "--only", "int9.onnx")
    assert "Triton serves ONNX files" in says(run, "--out", out, "--only", "int8.qsb", "--triton")
    save_graph(run / "other.onnx", classes=["a", "b", "c"])
    assert "other.onnx differ in their labels; choose the files of one model with --only" in says(run, "--out", out)
    save_graph(run / "other.onnx", task="segmentation")
    assert "other.onnx: a segmentation model" in says(run, "--out", out)
    save_graph(run / "other.onnx", classes=["a", "b\nc", "d"])
    assert "is not one line" in says(run, "--out", out, "--only", "other.onnx")
    (run / "other.onnx").write_bytes(b"no graph")
    assert "other.onnx: not an ONNX file" in says(run, "--out", out)
    (run / "other.onnx").unlink()
    (run / "int8.pt2").write_bytes(b"changed")
    assert "int8.pt2: truncated or changed since its sidecar was written" in says(run, "--out", out)
    (run / "int8.pt2.json").unlink()
    assert "int8.pt2: its sidecar int8.pt2.json is missing" in says(run, "--out", out)


def test_a_graph_without_metadata_is_refused(tmp_path, capsys):
    import onnx

    graph = onnx.load(save_graph(tmp_path / "run" / "a.onnx"))
    del graph.metadata_props[:]
    onnx.save(graph, tmp_path / "run" / "a.onnx")
    line = fails(capsys, "package", tmp_path / "run", "--out", tmp_path / "out")
    assert "has no qswin metadata" in line and not (tmp_path / "out").exists()


def test_a_folder_that_is_there_is_kept(run, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    assert invoke("package", run, "--out", out) == 0  # it was empty
    before = sorted(path.name for path in out.iterdir())
    assert "is there already, and not an empty folder" in fails(capsys, "package", run, "--out", out)
    assert sorted(path.name for path in out.iterdir()) == before
    assert "is there already" in fails(capsys, "package", run, "--out", out / "README.md")


@pytest.mark.parametrize("failing", ["shutil.copyfile", "os.rename", "pathlib.Path.write_text"])
def test_a_full_disk_leaves_nothing(run, tmp_path, capsys, monkeypatch, failing):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(failing, full)
    line = fails(capsys, "package", run, "--out", tmp_path / "out", "--triton")
    assert "out: not saved (No space left on device)" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
