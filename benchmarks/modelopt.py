"""Side by side with NVIDIA ModelOpt on a CPU, in one run: calibration, a QAT step, nodes of the exported graph.

pip install nvidia-modelopt requests
python -m benchmarks.modelopt --out docs/results/modelopt-cpu.json

Swin-T with random weights and images; they cost what trained ones do. Both calibrate by a histogram's percentile 99.99.
ModelOpt quantizes the weighted layers (its INT8 default), as our `gemm` does; `full` adds attention and residuals.
"""

import argparse
import copy
import io
import json
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import modelopt
import modelopt.torch.quantization as mtq
import onnx
import torch
from modelopt.torch.quantization.model_calib import enable_stats_collection
from modelopt.torch.quantization.nn import TensorQuantizer as PeerQuantizer
from torch import nn

from benchmarks.results import commit, device_name
from qswin.calib.data.images import Preprocessing
from qswin.models.registry import build_model
from qswin.qat.checkpoint import Description
from qswin.qat.export.onnx_export import export_onnx
from qswin.qat.ptq.ranges import find_ranges, set_ranges
from qswin.qat.quant.recipe import named_recipe
from qswin.qat.quant.rewrite import quantize

NAME = "swin_tiny_patch4_window7_224"


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def float_forward(model: nn.Module, batches: list[torch.Tensor]) -> None:
    with torch.inference_mode():
        for batch in batches:
            model(batch)


def our_calibration(model: nn.Module, batches: list[torch.Tensor], recipe: str) -> nn.Module:
    twin = quantize(model, named_recipe(recipe))
    find_ranges(twin, batches)
    set_ranges(twin, "percentile")
    return twin


def histogram_calibration(
    model: nn.Module, batches: list[torch.Tensor], config: dict, method: str, **settings: float
) -> nn.Module:
    """ModelOpt with its histogram calibrator on activations, by `method`, and max on weights."""
    peer = mtq.quantize(copy.deepcopy(model), {**config, "algorithm": None})
    quantizers = {name: m for name, m in peer.named_modules() if isinstance(m, PeerQuantizer) and m.is_enabled}
    for name, quantizer in quantizers.items():
        if name.endswith("input_quantizer"):
            quantizer.set_from_attribute_config({"calibrator": "histogram"})
    enable_stats_collection(peer)
    with torch.no_grad():
        for batch in batches:
            peer(batch)
    for name, quantizer in quantizers.items():
        if name.endswith("input_quantizer"):
            quantizer.load_calib_amax(method, **settings)
        else:
            quantizer.load_calib_amax()
        quantizer.enable_quant()
        quantizer.disable_calib()
    return peer


def peer_calibration(model: nn.Module, batches: list[torch.Tensor]) -> nn.Module:
    return histogram_calibration(model, batches, mtq.INT8_DEFAULT_CFG, "percentile", percentile=99.99)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, images: torch.Tensor) -> None:
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(images), torch.arange(len(images))).backward()
    optimizer.step()


def median_steps(models: dict[str, nn.Module], images: torch.Tensor, repeats: int) -> dict[str, float]:
    """Median time of a training step of each model, taken in turns so that noise falls on all alike."""
    optimizers = {name: torch.optim.AdamW(model.train().parameters(), 1e-6) for name, model in models.items()}
    times: dict[str, list[float]] = {name: [] for name in models}
    for repeat in range(repeats + 1):
        for name, model in models.items():
            spent = seconds(lambda m=model, o=optimizers[name]: train_step(m, o, images))
            if repeat:
                times[name].append(spent)
    return {name: statistics.median(spent) for name, spent in times.items()}


def node_counts(ours: nn.Module, peer: nn.Module, image: torch.Tensor) -> dict[str, int]:
    """Nodes apart from Q/DQ."""
    description = Description({"name": NAME}, "ptq", Preprocessing(), recipe=named_recipe("gemm"))
    buffer = io.BytesIO()
    torch.onnx.export(peer.eval(), (image,), buffer, dynamo=False, opset_version=17)
    theirs = Counter(node.op_type for node in onnx.load_from_string(buffer.getvalue()).graph.node)
    mine = Counter(node.op_type for node in export_onnx(ours.eval(), description).graph)
    return {
        name: sum(count for kind, count in counts.items() if kind not in ("QuantizeLinear", "DequantizeLinear"))
        for name, counts in (("ours", mine), ("modelopt", theirs))
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    model = build_model(NAME)
    batches = list(torch.randn(args.images, 3, 224, 224).split(args.batch_size))
    float_forward(model, batches[:1])
    result = {
        "model": NAME,
        "modelopt": modelopt.__version__,
        "torch": torch.__version__,
        "device": device_name("cpu"),
        "commit": commit(),
        "images": args.images,
        "batch_size": args.batch_size,
        "seconds": {},
    }
    twins: dict[str, nn.Module] = {}
    works = {
        "float": lambda: float_forward(model, batches),
        "ours_gemm": lambda: twins.update(ours_gemm=our_calibration(model, batches, "gemm")),
        "ours_full": lambda: twins.update(ours_full=our_calibration(model, batches, "full")),
        "modelopt": lambda: twins.update(modelopt=peer_calibration(model, batches)),
        "float_again": lambda: float_forward(model, batches),
    }
    for name, work in works.items():
        result["seconds"][f"calibrate_{name}"] = seconds(work)
        print(name, result["seconds"], flush=True)
    result["nodes"] = node_counts(twins["ours_gemm"], twins["modelopt"], batches[0][:1])
    print(result["nodes"], flush=True)
    twins = {name: copy.deepcopy(twin) for name, twin in twins.items()}
    steps = median_steps({"float": copy.deepcopy(model), **twins}, batches[0][:8], args.repeats)
    result["seconds"] |= {f"step_{name}": spent for name, spent in steps.items()}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
