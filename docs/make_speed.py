"""Draws docs/pictures/speed.png from docs/results/speed-h200.json: python docs/make_speed.py"""

import json
from pathlib import Path

from trt.plots import pyplot

DOCS = Path(__file__).parent
PEER = "torch.compile default, CUDA graph"
BACKENDS = {  # as in the rows: its label
    "torch eager, CUDA graph": "torch FP16",
    PEER: "torch.compile FP16",
    "qswin kernels, CUDA graph": "qswin INT8",
}
MODELS = {
    "swin_tiny_patch4_window7_224": "Swin-T",
    "swin_base_patch4_window7_224": "Swin-B",
    "swinv2_tiny_window8_256": "SwinV2-T",
}


def draw(path: Path) -> None:
    """Images/s of each model and batch, as multiples of torch.compile's FP16, with the figures on the bars."""
    rows = json.loads((DOCS / "results" / "speed-h200.json").read_text())["rows"]
    rates = {(row["model"], row["batch"], row["backend"]): row["images_per_second"] for row in rows}
    places = [(model, batch) for model in MODELS for batch in (1, 64, 256) if (model, batch, next(iter(BACKENDS))) in rates]
    figure, axes = pyplot().subplots(figsize=(9, 3.6), layout="constrained")
    for shift, (backend, label) in enumerate(BACKENDS.items()):
        found = [rates[(*place, backend)] for place in places]
        heights = [rate / rates[(*place, PEER)] for rate, place in zip(found, places, strict=True)]
        bars = axes.bar([position + 0.27 * (shift - 1) for position in range(len(places))], heights, 0.25, label=label)
        axes.bar_label(bars, [f"{rate:,.0f}" for rate in found], fontsize=8, padding=2)
    axes.set_xticks(range(len(places)), [f"{MODELS[model]}, batch {batch}" for model, batch in places])
    axes.set_ylabel("times torch.compile FP16")
    axes.legend(loc="upper left", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    draw(DOCS / "pictures" / "speed.png")
