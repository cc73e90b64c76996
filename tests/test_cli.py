"""Commands as a user types them: help, exit codes, and one line about what is wrong."""

import errno
import importlib.metadata
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from qswin import cli
from qswin.trt.graphs.runtime import OnnxRuntimePredictor
from tests.helpers import fails, invoke
from tests.models.checkpoints.test_logits import HF_VIT, save_pretrained

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help_with_an_example(command, capsys):
    assert invoke(command, "--help") == 0
    assert "example:\n" in capsys.readouterr().out


@pytest.mark.slow
def test_what_a_command_did_can_be_had_as_json(config_file, data, tmp_path):
    """Every command but completion, which prints a script; then the report shows what the others wrote."""
    pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    run, val = tmp_path / "run", data / "val"
    ptq, onnx, probe = run / "ptq.safetensors", run / "fp32.onnx", ("--data", data / "train", "--images", 4)
    small = ("recipe=gemm", "device=cpu", "data.workers=0", "calibration.equalize=false")
    budget = ("--sensitivity", run / "sensitivity.json", "--budget", "kl<=9")
    steps = [
        ("calibrate", "checkpoint report", "--config", config_file),
        ("train", "checkpoint report", "--config", config_file, f"init={ptq}", "train.epochs=1"),
        (
            "convert",
            "checkpoint report",
            "--config",
            config_file,
            f"model.checkpoint={ptq}",
            f"run={tmp_path / 'other'}",
        ),
        ("export", "export", "--checkpoint", ptq, "--onnx", onnx, "--precision", "fp32"),
        ("build", "build", "--onnx", onnx, "--engine", run / "a.engine", "--target", "tensorrt-rtx"),
        ("calib-cache", "calibration cache report", "--onnx", onnx, "--cache", run / "a.cache", "--offline", *probe),
        ("evaluate", "evaluation", "--model", onnx, "--data", val),
        ("bench", "timing", "--model", onnx, "--batch-sizes", 1),
        ("compare", "comparison", "--model", onnx, "--reference", onnx, "--images", 2),
        ("inspect", "layers", "--model", onnx),
        ("inspect", "quantizers", "--model", ptq),
        ("sensitivity", "sensitivity", "--checkpoint", ptq, *probe, "--by", "layer"),
        ("search", "search", "--checkpoint", ptq, *probe, *budget, "--recipe", run / "mixed.yaml"),
        ("doctor", "doctor"),
        ("models", "models", "swin*"),
        ("init", "checkpoint description", tmp_path / "weights.pth", "--out", tmp_path / "init.yaml"),
        (
            "quantize",
            "quantization",
            "--model",
            tmp_path / "weights.pth",
            "--data",
            data,
            "-o",
            tmp_path / "one",
            *small,
        ),
        ("report", "report", run),
        ("package", "deployment", run, "--out", tmp_path / "deploy", "--triton"),
    ]
    assert {command for command, *_ in steps} == set(cli.COMMANDS) - {"completion"}
    for command, kind, *arguments in steps:
        file = run / f"{kind}.json"
        assert invoke(command, *arguments, "--json", file) == 0, command
        written = json.loads(file.read_text())
        assert written["kind"] == kind and "python" in written["versions"], command
    headings = re.findall("<h2>(.*?)</h2>", (run / "report.html").read_text())
    assert headings == [
        *("Summary", "Accuracy", "Verdicts", "Speed", "Training", "Sensitivity", "Ranges", "Histograms", "Layers"),
        *("Comparisons", "Mixed precision", "Exports", "Builds"),
    ]


def test_the_table_of_commands(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["qswin"])
    cli.main()
    listed = capsys.readouterr().out
    assert all(name in listed for name in cli.COMMANDS)


def test_a_command_that_does_not_exist_is_answered_with_the_nearest(capsys, monkeypatch):
    for word, answer in (("calibrat", "did you mean calibrate?"), ("xyz", "there are quantize, models, init, ")):
        monkeypatch.setattr(sys, "argv", ["qswin", word])
        with pytest.raises(SystemExit, match="2"):
            cli.main()
        assert answer in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["help", "bench"], ["bench", "--help"]])
def test_help_of_a_command(capsys, monkeypatch, arguments):
    monkeypatch.setattr(sys, "argv", ["qswin", *arguments])
    with pytest.raises(SystemExit, match="0"):
        cli.main()
    assert "usage: qswin bench" in capsys.readouterr().out


def test_help_alone_lists_the_commands_and_the_version_is_the_packages(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["qswin", "help"])
    cli.main()
    assert "calibrate" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["qswin", "--version"])
    cli.main()
    assert capsys.readouterr().out == f"qswin {importlib.metadata.version('qswin')}\n"


def test_calibrate_export_evaluate_inspect(config_file, data, tmp_path, capsys):
    run, out = tmp_path / "run", tmp_path / "out.json"
    assert invoke("calibrate", "--config", config_file, "--json", out) == 0
    made = json.loads(out.read_text())
    sidecar = json.loads((run / "ptq.safetensors.json").read_text())
    assert (
        made.items() >= ({"checkpoint": str(run / "ptq.safetensors")} | sidecar | {"kind": "checkpoint report"}).items()
    )
    assert made["metrics"]["calibration_images"] > 0
    assert (
        invoke("export", "--checkpoint", run / "ptq.safetensors", "--onnx", run / "int8.onnx", "--json", run / "e.json")
        == 0
    )
    made = json.loads((run / "e.json").read_text())
    assert (made["bytes"], made["precision"]) == ((run / "int8.onnx").stat().st_size, "int8") and made["qdq_nodes"] > 50
    for model in ("ptq.safetensors", "int8.onnx"):
        assert invoke("evaluate", "--model", run / model, "--data", data / "val", "--json", run / "r.json") == 0
    assert invoke("inspect", "--model", run / "ptq.safetensors") == 0
    assert "layers.1.downsample.reduction.weight" in capsys.readouterr().out


@pytest.mark.slow
def test_bare_weights_are_evaluated_and_exported_with_their_config(config_file, data, tmp_path):
    weights = tmp_path / "weights.pth"
    assert invoke("evaluate", "--model", weights, "--data", data / "val", "--config", config_file) == 0
    onnx = tmp_path / "a.onnx"
    assert (
        invoke("export", "--checkpoint", weights, "--onnx", onnx, "--precision", "fp32", "--config", config_file) == 0
    )
    assert onnx.is_file()


@pytest.mark.slow
def test_a_folder_of_transformers_is_evaluated_and_exported(data, tmp_path, capsys):
    folder, onnx = tmp_path / "vit", tmp_path / "vit.onnx"
    transformers = pytest.importorskip("transformers")
    model = save_pretrained("ViT", folder, **HF_VIT, num_attention_heads=2)
    assert invoke("evaluate", "--model", folder, "--data", data / "val", "--json", tmp_path / "a.json") == 0
    assert json.loads((tmp_path / "a.json").read_text())["images"] == 20
    assert invoke("export", "--checkpoint", folder, "--onnx", onnx, "--precision", "fp32") == 0
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(x).logits.numpy()
    np.testing.assert_allclose(OnnxRuntimePredictor(onnx)(x.numpy()), expected, atol=1e-4 * abs(expected).max())
    assert "without weights" in fails(capsys, "evaluate", "--model", tmp_path, "--data", data / "val")
    (folder / "model.safetensors").unlink()
    assert "without weights" in fails(capsys, "evaluate", "--model", folder, "--data", data / "val")
    transformers.ViTModel(model.config).save_pretrained(folder)
    headless = fails(capsys, "evaluate", "--model", folder, "--data", data / "val")
    assert "it is a model without a classifier; qswin init" in headless


def test_calibrate_says_what_is_wrong(config_file, data, tmp_path, capsys):
    def says(*arguments):
        return fails(capsys, "calibrate", "--config", config_file, *arguments)

    assert "unknown key 'calibration.image'; the nearest is 'calibration.images'" in says("calibration.image=3")
    assert "train.epochs" in says("train.epochs=soon")
    assert "no such folder" in says(f"data.root={tmp_path / 'nowhere'}")
    assert "calibration.images=0 is out of range; give 1 to 1000000000" in says("calibration.images=0")
    assert "nearest names are" in says("model.name=swin_tinny")
    assert "no such checkpoint" in says("model.checkpoint=missing.pth")
    assert "head.fc.weight has shape (5, 32), not (7, 32)" in says("model.num_classes=7")
    assert "recipe 'fulll' is not known" in says("recipe=fulll")
    assert not (tmp_path / "run").exists()
    (bad := data / "train" / "class0" / "0.png").write_bytes(b"no image")
    assert f"{bad}: missing, or cannot be read" in says("calibration.images=20")
    assert not list((tmp_path / "run").glob("*.safetensors"))
    assert invoke("calibrate", "--config", config_file, "data.skip_unreadable=true") == 0
    assert "used by another job (calibrate.yaml has calibration.images=8, not 9)" in says(
        "data.skip_unreadable=true", "calibration.images=9"
    )


def test_pickled_code_is_never_run(config_file, tmp_path, capsys):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    torch.save({"model": Payload()}, tmp_path / "evil.pth")
    line = fails(capsys, "calibrate", "--config", config_file, f"model.checkpoint={tmp_path / 'evil.pth'}")
    assert "pickled code" in line and not (tmp_path / "executed").exists()


def test_export_and_evaluate_say_what_is_wrong(config_file, data, tmp_path, capsys):
    weights, onnx = tmp_path / "weights.pth", tmp_path / "a.onnx"
    assert "no such checkpoint" in fails(capsys, "export", "--checkpoint", "x.safetensors", "--onnx", onnx)
    assert "sidecar" in fails(capsys, "export", "--checkpoint", weights, "--onnx", onnx)
    described = ("--checkpoint", weights, "--onnx", onnx, "--config", config_file)
    assert "run qswin calibrate first" in fails(capsys, "export", *described)
    assert "opset 13 is too old" in fails(capsys, "export", *described, "--precision", "fp32", "--opset", 13)
    for size in ("two", 0, 10**12):
        line = fails(capsys, "export", *described, "--batch-size", size)
        assert f"--batch-size '{size}': give a number of 1 to 65536, or dynamic" in line
    assert not onnx.exists()
    (tmp_path / "few" / "a").mkdir(parents=True)
    assert "no images" in fails(
        capsys, "evaluate", "--model", weights, "--data", tmp_path / "few", "--config", config_file
    )


@pytest.mark.slow
def test_a_full_disk_leaves_no_half_checkpoint(config_file, tmp_path):
    """The kernel refuses files over 40 kB: the config of the run fits, the checkpoint does not."""
    script = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from qswin import cli
import qswin.qat.ptq.calibrate  # before the limit: importing writes caches
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (40000, hard))
try:
    cli.run_command("calibrate", ["--config", sys.argv[1]])
finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))  # for what coverage writes at the end
"""
    done = subprocess.run([sys.executable, "-c", script, str(config_file)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "ptq.safetensors: not saved" in done.stderr.splitlines()[-1]
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["calibrate.yaml"]


def test_a_disk_that_is_full_at_any_write(config_file, tmp_path, capsys, monkeypatch):
    """One line, exit code 2; what it calls whole is there and can be read, and the same command goes on."""
    replace, out = os.replace, tmp_path / "out.json"
    named = []
    for nth in range(1, 7):
        writes = iter(range(1, 100))

        def failing(source, target, nth=nth, writes=writes):
            if next(writes) == nth:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            replace(source, target)

        monkeypatch.setattr(os, "replace", failing)
        run = tmp_path / f"run{nth}"
        arguments = ("calibrate", "--config", config_file, f"run={run}", "--json", out)
        capsys.readouterr()
        if (code := invoke(*arguments)) == 0:
            break
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert code == 2 and "not saved (No space left on device)" in line
        whole = [Path(name) for name in line.partition("whole: ")[2].split(", ") if name]
        named.append([path.name for path in whole if path.parent == run])
        assert set(named[-1]) >= {path.name for path in run.glob("*") if path.name != "ptq.safetensors" or nth > 3}
        assert not list(run.glob(".*"))
    settings = ["calibrate.yaml"]
    pair = [*settings, "ptq.safetensors", "ptq.safetensors.json"]
    assert named == [[], settings, settings, pair, [*pair, "histograms.npz"]] and out.is_file()


def run_main(main) -> int:
    """Runs a command that has no arguments and returns its exit code."""
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda parser: None, main, "qswin x", [])
    return stop.value.code or 0


def test_names_cannot_write_to_the_terminal(tmp_path, capsys):
    evil = tmp_path / "a\x1b[31m\x9b2J\udcff.onnx"
    line = fails(capsys, "evaluate", "--model", evil, "--data", tmp_path)
    assert line.endswith(r"a\x1b[31m\x9b2J\udcff.onnx: no such ONNX file")
    assert invoke("evaluate", "--model\x1b[31m") == 2
    assert "\x1b" not in capsys.readouterr().err
    assert run_main(lambda args: print("\x1b[31mtable\nline")) == 0
    assert capsys.readouterr().out == "\\x1b[31mtable\nline\n"


@pytest.mark.parametrize("written", ["--flagfile={}", "-flagfile={}", "--flagfile {}"])
def test_no_flag_reads_a_file_of_flags(tmp_path, capsys, written):
    (tmp_path / "secret").write_text("--hunter2\n")
    assert invoke("evaluate", *written.format(tmp_path / "secret").split()) == 2
    err = capsys.readouterr().err
    assert "hunter2" not in err and "--flagfile is off" in err


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("last.pt holds 3 of 9 steps", "qswin x: stopped; last.pt holds 3 of 9 steps"),
        ("", "qswin x: stopped; every file that it wrote is whole; the same command starts again"),
    ],
)
def test_ctrl_c_ends_with_one_line(capsys, message, line):
    before = signal.getsignal(signal.SIGINT)

    def stopped(args):
        raise KeyboardInterrupt(*filter(None, [message]))

    try:
        assert run_main(stopped) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == f"{line}\n"


def test_ctrl_c_while_a_command_is_imported_ends_with_one_line(capsys, monkeypatch):
    def stopped(command):
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(cli, "command_module", stopped)
    try:
        with pytest.raises(SystemExit) as ended:
            cli.run_command("evaluate", [])
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended.value.code == 130 and capsys.readouterr().err.startswith("qswin evaluate: stopped; ")


def test_what_a_command_holds_is_let_go_before_it_exits(capsys):
    """Processes that still decode are ended in order; Python's own exit would leave them halfway."""

    def batches():
        try:
            yield
        finally:
            print("let go", file=sys.stderr)

    def fails(args):
        held = batches()
        next(held)
        raise ValueError("wrong")

    assert run_main(fails) == 2
    assert capsys.readouterr().err == "let go\nqswin x: error: wrong\n"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried ..."),
        RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"),
    ],
)
def test_too_little_memory_is_one_line(capsys, error):
    def allocates(args):
        raise error

    assert run_main(allocates) == 2
    assert capsys.readouterr().err.startswith("qswin x: error: it takes more memory than there is; ")


def test_sigterm_is_as_ctrl_c(capsys):
    before, handler = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    try:
        assert run_main(lambda args: (os.kill(os.getpid(), signal.SIGTERM), time.sleep(10))) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err.startswith("qswin x: stopped; ") and signal.getsignal(signal.SIGTERM) == handler


@pytest.mark.parametrize(
    ("redirection", "main", "code", "errors"),
    [
        (">&-", "print('x' * 100_000)", 0, ""),
        ("| true", "(time.sleep(0.5), print('x' * 100_000))", 0, ""),
        (">/dev/full", "print('x')", 2, "qswin x: error: [Errno 28] No space left on device\n"),
        ("2>&-", "int('x')", 2, ""),
        (">&- 2>&-", "logging.warning('x')", 0, ""),
    ],
)
def test_closed_streams_end_a_command_quietly(redirection, main, code, errors):
    script = f"""
import time
from absl import logging
from qswin import cli
cli.run(lambda parser: None, lambda args: {main}, "qswin x", [])
"""
    command = f"set -o pipefail; {sys.executable} -c {shlex.quote(script)} {redirection}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (code, errors)


@pytest.mark.parametrize("value", ["abc", "0", "nan", "inf", "1e300", ""])
def test_limits_that_are_no_number_are_one_line(value):
    command = [sys.executable, "-m", "qswin", "evaluate", "--model", "x", "--data", "y"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "QSWIN_LIMITS": value})
    line = f"qswin evaluate: error: QSWIN_LIMITS={value!r} in the environment is not a number above 0 and below 10^6\n"
    assert (done.returncode, done.stderr) == (2, line)


def test_a_defect_keeps_its_traceback(monkeypatch):
    def broken(args):
        raise RuntimeError("a defect")

    with pytest.raises(RuntimeError, match="a defect"):
        cli.run(lambda parser: None, broken, "qswin", [])


@pytest.mark.slow
@pytest.mark.timeout(1800)  # equalizing a Swin-T takes minutes on one core
@pytest.mark.assets
def test_the_trained_swin_scores_what_it_should(assets, tmp_path, capsys):
    """The shared Swin-T, INT8 by calibration on 16 images, on 100 validation images: near the float model's answers."""
    import json
    import tarfile

    for split in ("train10k", "val5k"):
        with tarfile.open(assets / f"tiny_imagenet_{split}.tar") as tar:
            tar.extractall(tmp_path / "data", filter="data")
    config = ("--config", ROOT / "configs" / "swin_tiny_tinyimagenet.yaml", f"data.root={tmp_path / 'data'}")
    weights = assets / "swin_tiny_tinyimagenet.safetensors"
    calibration = ("calibration.images=16", "calibration.batch_size=16", f"run={tmp_path / 'run'}")
    assert invoke("calibrate", *config, f"model.checkpoint={weights}", *calibration) == 0
    scores = {}
    for name, arguments in {"float": (weights, *config[:2]), "ptq": (tmp_path / "run" / "ptq.safetensors",)}.items():
        file = tmp_path / f"{name}.json"
        options = ("--data", tmp_path / "data" / "val", "--images", 100, "--json", file)
        assert invoke("evaluate", "--model", arguments[0], *arguments[1:], *options) == 0
        scores[name] = json.loads(file.read_text())
    assert scores["float"]["acc1"] == pytest.approx(48, abs=10)
    assert scores["ptq"]["acc1"] == pytest.approx(scores["float"]["acc1"], abs=4)
