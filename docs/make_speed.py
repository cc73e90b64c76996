"""Draws docs/pictures/speed.png from docs/results/speed-h200.json: python docs/make_speed.py"""

import json
from pathlib import Path

from qswin.trt.report.plots import pyplot

DOCS = Path(__file__).parent
PEER = ("torch.compile default, CUDA graph", "fp16")
BACKENDS = {  # (backend, precision) as in the rows: its label
    ("torch eager, CUDA graph", "fp16"): "torch FP16",
    ("tensorrt 8.6.0, CUDA graph", "fp16"): "TensorRT 8.6 FP16",
    PEER: "torch.compile FP16",
    ("torch.compile max-autotune-no-cudagraphs, CUDA graph", "fp16"): "the same, max-autotune",
    ("qswin kernels, CUDA graph", "int8"): "qswin INT8",
}
MODELS = {
    "swin_tiny_patch4_window7_224": "Swin-T",
    "swin_base_patch4_window7_224": "Swin-B",
    "swinv2_tiny_window8_256": "SwinV2-T",
}


def draw(path: Path) -> None:
    """Images/s of each model and batch, as multiples of torch.compile's FP16, with the figures on the bars.

    Of a backend that was measured twice the later figure is drawn; one that was not measured has no bar.
    """
    rows = json.loads((DOCS / "results" / "speed-h200.json").read_text())["rows"]
    rates = {
        (row["model"], row["batch"], row["backend"], row["precision"]): row["images_per_second"]
        for row in rows
        if row.get("recipe", "none") == "none"
    }
    places = [(model, batch) for model in MODELS for batch in (1, 64, 256) if (model, batch, *PEER) in rates]
    figure, axes = pyplot().subplots(figsize=(11, 3.8), layout="constrained")
    for shift, (backend, label) in enumerate(BACKENDS.items()):
        measured = [(position, place) for position, place in enumerate(places) if (*place, *backend) in rates]
        found = [rates[(*place, *backend)] for _, place in measured]
        heights = [rate / rates[(*place, *PEER)] for rate, (_, place) in zip(found, measured, strict=True)]
        bars = axes.bar([position + 0.17 * (shift - 2) for position, _ in measured], heights, 0.16, label=label)
        axes.bar_label(bars, [f"{rate:,.0f}" for rate in found], fontsize=7, padding=2)
    axes.set_xticks(range(len(places)), [f"{MODELS[model]}, batch {batch}" for model, batch in places])
    axes.set_ylabel("times torch.compile FP16")
    axes.legend(loc="upper left", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    draw(DOCS / "pictures" / "speed.png")
