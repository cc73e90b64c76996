"""The job of `qswin quantize`: from a checkpoint and images to a calibrated model, its graphs and a report."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qswin.calib.data.folders import training_folder
from qswin.calib.files import write_atomic, write_result
from qswin.qat.checkpoint import load_checkpoint
from qswin.qat.config import load_config
from qswin.qat.distributed import process_group
from qswin.qat.export.job import Exported, ExportOptions, export_checkpoint
from qswin.qat.foreign.first_config import Found, config_text, describe, look_at
from qswin.qat.ptq.job import run_calibration
from qswin.qat.quant.quantizers import own_precision
from qswin.qat.runs import one_job
from qswin.trt.evaluation.compare import model_errors, read_images, sentence
from qswin.trt.graphs.runtime import OnnxRuntimePredictor
from qswin.trt.report.sections import write_report

CONFIG, COMPARISON, REPORT = "config.yaml", "compare.json", "report.html"
COMPARED = 64  # images that the two graphs are compared on


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of it.

    Args:
        floating, quantized: the graphs.
        errors: of the quantized graph against the float one in ONNX Runtime, see `output_errors`.
    """

    found: Found
    folder: Path
    floating: Exported
    quantized: Exported
    errors: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        graphs = {"float_onnx": self.floating.to_dict(), "quantized_onnx": self.quantized.to_dict()}
        return {**self.found.facts(), "run": str(self.folder), **graphs, "comparison": self.errors}

    def __str__(self) -> str:
        smaller = self.floating.size / self.quantized.size
        beside = sentence(self.errors, self.errors["images"])
        return "\n".join(
            (
                describe(self.found),
                f"{self.quantized.path}: {self.quantized.size / 1e6:.1f} MB, {smaller:.1f} times less than FP32",
                f"against FP32, in ONNX Runtime: {beside}",
                f"{self.folder / REPORT}: all of it on one page",
                f"next: qswin evaluate --model {self.quantized.path} --data DIR, whose images have labels",
            )
        )


def quantize_checkpoint(model: Path, data: Path, out: Path, overrides: Sequence[str]) -> Outcome:
    """Calibrates a checkpoint of any library; writes its config, itself, its graphs, their comparison and a report.

    A second call with the same settings goes on from what is there.

    Args:
        data: a folder of images, with or without class folders, or with train/ in it.
        out: the run's folder.
        overrides: settings over the config's, as `load_config` takes them.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: it is not a checkpoint that is known, it has no head, or a setting is wrong.
    """
    found = dataclasses.replace(look_at(model, None), data=data)  # whatever its folders are called
    write_atomic(out / CONFIG, config_text(found, out / CONFIG, str(out)).encode())
    config = load_config(out / CONFIG, list(overrides))
    with process_group(config.device) as ranks, one_job(out, ranks.main):
        checkpoint = run_calibration(config, ranks)
    precision = own_precision(load_checkpoint(checkpoint)[0])
    floating, quantized = (
        export_checkpoint(checkpoint, out / f"{name}.onnx", ExportOptions(name))[0] for name in ("fp32", precision)
    )
    errors = _compare(quantized, floating, training_folder(data))
    write_result(out / COMPARISON, "comparison", errors)
    write_report(out, out / REPORT)
    return Outcome(found, out, floating, quantized, errors)


def _compare(quantized: Exported, floating: Exported, data: Path) -> dict[str, Any]:
    ours, theirs = (OnnxRuntimePredictor(graph.path) for graph in (quantized, floating))
    images = read_images(data, COMPARED, theirs.task, theirs.preprocessing)
    named = {"model": str(quantized.path), "reference": str(floating.path), "images": len(images)}
    return {**named, **model_errors(ours, theirs, images)}
