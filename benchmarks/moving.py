"""Checkpoints calibrated by ModelOpt and pytorch-quantization, taken over by `qswin convert`: do they answer the same?

    pip install nvidia-modelopt requests       # or: pytorch-quantization's sources on PYTHONPATH
    python -m benchmarks.moving --toolkit modelopt --data DIR --checkpoint FILE --out docs/results/moving.json

Swin-T on Tiny-ImageNet: the toolkit calibrates the weighted layers on training images, saves its state dict, and both
models see the same validation images. Of pytorch-quantization, frozen and not on the index, its own repository's Python
is enough: on a CPU nothing compiled is called. Its layers are put in by hand: its patches of torch.nn refuse what timm
passes today.
"""

import argparse
import copy
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.results import commit, device_name, write_rows
from qswin.calib.data.batches import image_batches
from qswin.calib.data.folders import draw_samples, scan_folder, spread_samples
from qswin.calib.data.images import Preprocessing
from qswin.qat.checkpoint import load_checkpoint
from qswin.qat.config import load_config
from qswin.qat.float_model import build_float_model
from qswin.qat.quant.layers import QuantConv2d, QuantLinear

CONFIG = "configs/swin_tiny_tinyimagenet.yaml"


def modelopt(model: nn.Module, batches: list[Tensor]) -> tuple[str, nn.Module]:
    """Its INT8 default, with the histogram calibrator and percentile 99.99."""
    import modelopt as library
    import modelopt.torch.quantization as mtq

    from benchmarks.modelopt import histogram_calibration

    calibrated = histogram_calibration(model, batches, mtq.INT8_DEFAULT_CFG, "percentile", percentile=99.99)
    return library.__version__, calibrated


def modelopt_smoothquant(model: nn.Module, batches: list[Tensor]) -> tuple[str, nn.Module]:
    """Its SmoothQuant as published: alpha 1, max ranges."""
    import modelopt as library
    import modelopt.torch.quantization as mtq

    def forward(twin: nn.Module) -> None:
        with torch.inference_mode():
            for batch in batches:
                twin(batch)

    return library.__version__, mtq.quantize(copy.deepcopy(model), mtq.INT8_SMOOTHQUANT_CFG, forward)


def pytorch_quantization(model: nn.Module, batches: list[Tensor]) -> tuple[str, nn.Module]:
    """Histogram and percentile 99.99 of activations, the largest of each channel of weights."""
    sys.modules.setdefault("pytorch_quantization.cuda_ext", type(sys)("pytorch_quantization.cuda_ext"))
    import pytorch_quantization as library
    from pytorch_quantization.calib import HistogramCalibrator
    from pytorch_quantization.nn import TensorQuantizer

    twin = with_their_layers(model)
    quantizers = [module for module in twin.modules() if isinstance(module, TensorQuantizer)]
    for quantizer in quantizers:
        quantizer.disable_quant()
        quantizer.enable_calib()
    with torch.no_grad():
        for batch in batches:
            twin(batch)
    for quantizer in quantizers:
        if isinstance(quantizer._calibrator, HistogramCalibrator):
            quantizer.load_calib_amax("percentile", percentile=99.99)
        else:
            quantizer.load_calib_amax()
        quantizer.disable_calib()
        quantizer.enable_quant()
    return library.__version__, twin


def with_their_layers(model: nn.Module) -> nn.Module:
    """A copy with QuantLinear and QuantConv2d for each linear and convolution, as its users write it."""
    from pytorch_quantization.nn import QuantConv2d, QuantLinear
    from pytorch_quantization.tensor_quant import QuantDescriptor

    twin, histogram = copy.deepcopy(model), QuantDescriptor(calib_method="histogram")
    for name, layer in list(twin.named_modules()):
        if isinstance(layer, nn.Linear):
            made = QuantLinear(
                layer.in_features, layer.out_features, layer.bias is not None, quant_desc_input=histogram
            )
        elif isinstance(layer, nn.Conv2d):
            sizes = layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride
            made = QuantConv2d(*sizes, bias=layer.bias is not None, quant_desc_input=histogram)
        else:
            continue
        made.load_state_dict(layer.state_dict())
        twin.set_submodule(name, made.eval())
    return twin


TOOLKITS: dict[str, Callable[[nn.Module, list[Tensor]], tuple[str, nn.Module]]] = {
    "modelopt": modelopt,
    "modelopt-smoothquant": modelopt_smoothquant,
    "pytorch-quantization": pytorch_quantization,
}


def converted(state: dict[str, Tensor]) -> nn.Module:
    """By the command that users run."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "theirs.pth"
        torch.save(state, path)
        settings = ["data.root=unused", "recipe=gemm", f"model.checkpoint={path}", f"run={folder}/run"]
        subprocess.run([sys.executable, "-m", "qswin", "convert", "--config", CONFIG, *settings], check=True)
        return load_checkpoint(Path(folder) / "run" / "ptq.safetensors")[0].eval()


def logits(
    networks: list[nn.Module], samples: list, preprocessing: Preprocessing
) -> tuple[list[np.ndarray], np.ndarray]:
    """What each network answers to the same images, and the images' labels."""
    found: list[list[np.ndarray]] = [[] for _ in networks]
    labels = []
    with torch.inference_mode():
        for batch in image_batches(samples, preprocessing, 32, 2):
            labels.append(batch.labels)
            for answers, network in zip(found, networks, strict=True):
                answers.append(network(torch.from_numpy(batch.images)).numpy())
    return [np.concatenate(answers) for answers in found], np.concatenate(labels)


@torch.inference_mode()
def layers_apart(theirs: nn.Module, ours: nn.Module, images: Tensor) -> float:
    """The largest mean difference of a layer's outputs, as a share of their mean, where both get the input of theirs.

    It is what two implementations of one quantizer differ by; from layer to layer rounding makes more of it.
    """
    found: dict[str, float] = {}

    def measure(name: str, inputs: Tensor, output: Tensor) -> None:
        found[name] = float((ours.get_submodule(name)(inputs) - output).abs().mean() / output.abs().mean())

    for name, layer in ours.named_modules():
        if isinstance(layer, QuantLinear | QuantConv2d):
            theirs.get_submodule(name).register_forward_hook(
                lambda _, inputs, output, name=name: measure(name, inputs[0], output)
            )
    theirs(images)
    return max(found.values())


def compare(floats: np.ndarray, theirs: np.ndarray, ours: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Acc@1 of each, how often the last two agree, and how far their logits differ, beside quantization's own error."""
    accuracies = [round(100 * float((found.argmax(1) == labels).mean()), 2) for found in (floats, theirs, ours)]
    return {
        **dict(zip(("acc1_float", "acc1_theirs", "acc1_converted"), accuracies, strict=True)),
        "agreement": round(100 * float((theirs.argmax(1) == ours.argmax(1)).mean()), 2),
        "logits_apart": round(float(np.abs(theirs - ours).mean()), 5),
        "logits_quantization": round(float(np.abs(theirs - floats).mean()), 5),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toolkit", required=True, choices=list(TOOLKITS))
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--checkpoint", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--calibration_images", type=int, default=128)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--commit", default=commit())
    args = parser.parse_args()
    config = load_config(CONFIG, [f"data.root={args.data}", f"model.checkpoint={args.checkpoint}", "run=unused"])
    floating = build_float_model(config.model, config.data.preprocessing)
    model, preprocessing = floating.model, floating.preprocessing
    drawn = draw_samples(scan_folder("classification", args.data / "train"), args.calibration_images, 0)
    batches = [torch.from_numpy(batch.images) for batch in image_batches(drawn, preprocessing, 32, 2)]
    version, theirs = TOOLKITS[args.toolkit](model.eval(), batches)
    samples = spread_samples(scan_folder("classification", args.data / "val"), args.images)
    ours = converted(theirs.state_dict())
    answers, labels = logits([model, theirs, ours], samples, preprocessing)
    what = {"toolkit": args.toolkit, "version": version, "images": len(labels)}
    measured = {**compare(*answers, labels), "layers_apart": layers_apart(theirs, ours, batches[0])}
    row = {**what, **measured, "device": device_name("cpu"), "commit": args.commit}
    print(json.dumps(row), flush=True)
    rows = json.loads(args.out.read_text()) if args.out.is_file() else []
    write_rows(args.out, [*(old for old in rows if old["toolkit"] != args.toolkit), row])


if __name__ == "__main__":
    main()
