"""Sensitivity and search: KL against torch's, planted faults found, the greedy search against an exhaustive one."""

import itertools
import json

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
import yaml

from qswin.calib.data.batches import Batch, image_batches
from qswin.calib.data.folders import scan_folder
from qswin.calib.data.images import Preprocessing
from qswin.qat.checkpoint import Description, load_checkpoint, read_description, save_checkpoint
from qswin.qat.config import load_config
from qswin.qat.distributed import process_group
from qswin.qat.mixed_precision import latency, search, sensitivity
from qswin.qat.mixed_precision.search import (
    Candidate,
    bit_operations,
    candidates,
    fewest,
    most_in_float,
    parse_budget,
    share_of_operations,
)
from qswin.qat.mixed_precision.sensitivity import Divergence, Probe, group_quantizers, measure_groups, start_report
from qswin.qat.ptq import calibrate as ptq
from qswin.qat.ptq import job
from qswin.qat.quant.quantizers import quantizers
from qswin.qat.quant.recipe import named_recipe
from qswin.qat.quant.recipe_file import read_recipe
from qswin.qat.quant.rewrite import enable, quantize
from qswin.trt.engines.cuda import find_gpu
from qswin.trt.evaluation.timing import bench_onnx
from tests.helpers import fails, invoke, lively_swin

BAD = "layers.0.blocks.1.mlp.fc2"


@pytest.fixture
def checkpoint(config_file):
    torch.save(lively_swin().state_dict(), load_config(config_file, []).model.checkpoint)
    with process_group("cpu") as ranks:
        return job.run_calibration(load_config(config_file, []), ranks)


@pytest.fixture
def probe(images, data) -> Probe:
    """A calibrated small Swin with one range that is far too small."""
    twin = quantize(lively_swin(), named_recipe("full"))
    ptq.calibrate(twin, [images])
    next(q for q in quantizers(twin) if q.site == BAD)._amax.mul_(0.01)
    preprocessing = Preprocessing(size=(32, 32))
    folder = scan_folder("classification", data / "val")
    batches = list(image_batches(folder.samples, preprocessing, 8))
    description = Description({"name": "swin_tiny_patch4_window7_224"}, "ptq", preprocessing, folder.classes)
    return Probe(twin, description, batches, "cpu")


@pytest.mark.parametrize("shape", [(6, 9), (2, 4, 3, 5)])
def test_divergence_is_torchs(shape):
    rng = np.random.default_rng(0)
    floating, ours = rng.standard_normal((2, *shape)) * 3
    metric = Divergence([floating[:1], floating[1:]])
    for part in (slice(0, 1), slice(1, None)):
        metric.update(ours[part], Batch(ours[part], ours[part], []))
    p, q = (F.log_softmax(torch.from_numpy(x), dim=1) for x in (floating, ours))
    expected = F.kl_div(q, p, log_target=True, reduction="none").sum(1).mean().item()
    assert metric.result()["kl"] == pytest.approx(expected, rel=1e-6)


def test_a_bad_range_is_ranked_first_alone_and_when_left_out(probe, tmp_path):
    groups = group_quantizers(probe.model, "site")
    assert {q.site.removesuffix(".weight") for q in quantizers(probe.model)} == set(groups)
    rows = measure_groups(probe, groups, {"rows": []}, tmp_path / "s.json")
    assert rows[0]["name"] == BAD and rows[0]["alone"]["kl"] > 10 * rows[1]["alone"]["kl"]
    assert min(rows, key=lambda row: row["without"]["kl"])["name"] == BAD
    assert probe.measure([])["kl"] == 0


def test_a_row_is_what_switching_by_hand_gives(probe, tmp_path):
    name = "layers.1.blocks.0.attn.qkv"
    row = measure_groups(probe, {name: group_quantizers(probe.model, "site")[name]}, {"rows": []}, tmp_path / "s.json")[0]
    images = torch.from_numpy(np.concatenate([batch.images for batch in probe.batches]))
    with torch.no_grad():
        probe.switch([])
        floating = probe.model(images)
        for quantizer in quantizers(probe.model):
            if quantizer.site in (name, f"{name}.weight"):
                quantizer.quantize()
        alone = probe.model(images)
    ours, reference = (logits.double().log_softmax(1) for logits in (alone, floating))  # a small KL is rounding in float32
    expected = F.kl_div(ours, reference, log_target=True, reduction="batchmean").item()
    assert row["alone"]["kl"] == pytest.approx(expected, rel=1e-3)


def test_layers_hold_all_of_a_matmul(probe):
    layers = group_quantizers(probe.model, "layer")
    matmul = {q.site for q in layers["layers.0.blocks.0.attn.qk"]}
    assert matmul == {"layers.0.blocks.0.attn.q", "layers.0.blocks.0.attn.k"}
    assert sum(map(len, layers.values())) == len(list(quantizers(probe.model)))


def test_an_interrupted_run_goes_on(probe, tmp_path):
    """Rows that are there are kept as they are; another job's file is refused."""
    groups = dict(itertools.islice(group_quantizers(probe.model, "site").items(), 3))
    first = next(iter(groups))
    kept = {"name": first, "sites": [first], "alone": {"kl": 99.0}, "without": {"kl": 0.0}}
    report = {"job": {"seed": 0}, "rows": [kept]}
    rows = measure_groups(probe, groups, report, tmp_path / "s.json")
    assert rows[0] == kept and {row["name"] for row in rows} == set(groups)
    assert start_report(tmp_path / "s.json", {"seed": 0})["rows"] == json.loads((tmp_path / "s.json").read_text())["rows"]
    with pytest.raises(ValueError, match="seed was 0, now 1"):
        start_report(tmp_path / "s.json", {"seed": 1})
    (tmp_path / "t.json").write_text("[]")
    with pytest.raises(ValueError, match="not a sensitivity report"):
        start_report(tmp_path / "t.json", {})


def call(module, *arguments) -> None:
    assert invoke(module.__name__.rpartition(".")[2], *arguments) == 0


def test_the_commands_rank_and_find_a_recipe_that_calibrate_takes(checkpoint, data, config_file, tmp_path, capsys):
    """A damaged checkpoint: search leaves the damaged site in float, and little else."""
    model, description = load_checkpoint(checkpoint)
    next(q for q in quantizers(model) if q.site == BAD)._amax.mul_(0.01)
    save_checkpoint(tmp_path / "bad.safetensors", model, description)
    common = ["--checkpoint", tmp_path / "bad.safetensors", "--data", data / "train", "--images", 8, "--device", "cpu"]
    out, recipe = tmp_path / "s.json", tmp_path / "mixed.yaml"
    call(sensitivity, *common, "--out", out, "--plot", tmp_path / "s.png", "--top", 5)
    assert (tmp_path / "s.png").stat().st_size > 5000 and BAD in capsys.readouterr().out.splitlines()[1]
    limit = 2 * json.loads(out.read_text())["rows"][1]["alone"]["kl"] + 0.05 * json.loads(out.read_text())["all"]["kl"]
    call(search, *common, "--sensitivity", out, "--budget", f"kl<={limit:.8f}", "--recipe", recipe)
    config = load_config(config_file, [f"recipe={recipe}", f"run={tmp_path / 'mixed'}"])
    twin = quantize(lively_swin(), read_recipe(config.recipe, config.calibration.calibrator))
    assert BAD not in {quantizer.site for quantizer in quantizers(twin)}
    assert len(list(quantizers(twin))) > 0.5 * len(list(quantizers(model)))
    with process_group("cpu") as ranks:
        job.run_calibration(config, ranks)


def test_bit_operations_are_counted_by_hand(quantized):
    """One image, 32x32, patches of 2: 256 tokens of 16 channels in windows of 16."""
    enable(quantized)
    operations = bit_operations(quantized, torch.randn(1, 3, 32, 32))
    qkv = 256 * 16 * 48
    assert operations["layers.0.blocks.0.attn.qkv"] == (qkv * 64, qkv * 256)
    qk = 16 * 2 * 16 * 16 * 8  # windows, heads, tokens, tokens, channels of a head
    assert operations["layers.0.blocks.0.attn.q"] == (qk / 2 * 64, qk / 2 * 256)
    assert operations["layers.0.blocks.0.add1.shortcut"] == (256 * 16 * 8, 256 * 16 * 16)
    assert operations["patch_embed"] == (256 * 16 * 12 * 64, 256 * 16 * 12 * 256)
    assert set(operations) == set(group_quantizers(quantized, "site"))


def test_the_greedy_search_is_near_the_best_choice(probe, tmp_path):
    """Of all 2^6 choices over six layers, none that meets the budget has far fewer operations."""
    probe.batches = probe.batches[:1]
    chosen = [name for name in group_quantizers(probe.model, "layer") if ".add" not in name][:6]
    layers = group_quantizers(probe.model, "layer")
    report = {"rows": []}
    measure_groups(probe, {name: layers[name] for name in chosen}, report, tmp_path / "s.json")
    enable(probe.model)
    groups = candidates(report, bit_operations(probe.model, torch.randn(1, 3, 32, 32)))
    measured = {}
    for bits in itertools.product((False, True), repeat=len(groups)):
        kept = [q for group, floating in zip(groups, bits, strict=True) if not floating for q in layers[group.name]]
        measured[bits] = probe.measure(kept)["kl"]
    total = sum(group.floating for group in groups)

    def operations(bits: tuple[bool, ...]) -> float:
        return sum(g.floating if floating else g.quantized for g, floating in zip(groups, bits, strict=True)) / total

    for limit in np.quantile(list(measured.values()), [0.2, 0.4, 0.6, 0.8]):
        prefixes = [measured[tuple(i < n for i in range(len(groups)))] for n in range(len(groups) + 1)]
        greedy = fewest(lambda n, limit=limit, kl=prefixes: kl[n] <= limit, len(groups))
        best = min(operations(bits) for bits, kl in measured.items() if kl <= limit)
        assert best <= share_of_operations(groups, greedy) <= best + 0.3


def test_a_budget_of_operations_takes_all_that_fit():
    groups = [Candidate(name, [name], kl, 1.0, 4.0) for name, kl in (("a", 3.0), ("b", 2.0), ("c", 1.0))]

    def cost(count: int) -> float:
        return share_of_operations(groups, count)

    floats = most_in_float(cost, parse_budget("bops<=0.76", "acc1"), 3)
    assert share_of_operations(groups, floats) == 0.75 and floats == 2
    assert most_in_float(cost, parse_budget("bops<=1", "acc1"), 3) == 3
    with pytest.raises(ValueError, match="bops is 0.250 with every site quantized, 1.000 with none"):
        most_in_float(cost, parse_budget("bops<=0.1", "acc1"), 3)


def test_where_float_is_the_fastest_all_stays_in_float():
    assert most_in_float(lambda n: [5.0, 6.0, 7.0, 4.0][n], parse_budget("latency<=4.5", "acc1"), 3) == 3
    assert most_in_float(lambda n: [5.0, 6.0, 7.0, 8.0][n], parse_budget("latency<=6", "acc1"), 3) == 1


def test_latency_is_measured_of_the_mixed_model(probe, checkpoint, monkeypatch, tmp_path):
    """The graph that is timed holds as many pairs of Q and DQ as sites are quantized."""
    seen = []

    def timed(path, batches, args):
        graph = onnx.load(path).graph
        seen.append(sum(node.op_type == "QuantizeLinear" for node in graph.node))
        yield from bench_onnx(path, batches, args)

    monkeypatch.setattr(latency, "bench_onnx", timed)
    description = read_description(checkpoint)
    groups = [quantizer.site.removesuffix(".weight") for quantizer in quantizers(probe.model)]
    activations = {quantizer.site for quantizer in quantizers(probe.model) if not quantizer.site.endswith(".weight")}
    first = next(site for site in groups if site.endswith("qkv"))
    measured = latency.latencies(probe.model, description, [[first], groups], "onnxruntime", 2, tmp_path / "timing.cache")
    assert all(measured(count) > 0 for count in (1, 2, 1))
    assert seen == [len(activations) - 1, 0]


@pytest.mark.gpu
def test_engines_of_mixed_models_are_timed(probe, checkpoint, tmp_path):
    pytest.importorskip("tensorrt", reason="TensorRT is not installed")
    if find_gpu() is None:
        pytest.skip("there is no GPU")
    groups = [[quantizer.site.removesuffix(".weight")] for quantizer in quantizers(probe.model)]
    cache = tmp_path / "timing.cache"
    measured = latency.latencies(probe.model, read_description(checkpoint), groups, "tensorrt", 2, cache)
    assert all(0 < measured(count) < 100 for count in (0, 1, len(groups)))
    assert cache.is_file()


def test_the_command_keeps_to_a_latency(checkpoint, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(latency, "measure_latency", lambda *given: 1 + len(given[2]))
    common = ["--checkpoint", checkpoint, "--data", data / "train", "--images", 4, "--device", "cpu"]
    call(sensitivity, *common, "--by", "layer", "--out", tmp_path / "s.json")
    search_for = [*common, "--sensitivity", tmp_path / "s.json", "--recipe", tmp_path / "mixed.yaml", "--budget"]
    call(search, *search_for, "latency<=4", "--json", tmp_path / "found.json")
    floats = [rule for rule in yaml.safe_load((tmp_path / "mixed.yaml").read_text())["rules"] if rule["quantize"] is False]
    assert 2 <= len(floats) <= 3  # a layer has one site or two
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found["in_float"]) < len(floats) + 1 and len(found["in_float"] + found["quantized"]) == 35
    assert "latency is 1.000 with every site quantized, " in fails(capsys, "search", *search_for, "latency<=0.5")


@pytest.mark.parametrize("text", ["acc1_drop<0.1", "speed<=3", "kl<=", "acc1_drop<=-1", ""])
def test_a_wrong_budget_lists_the_right_ones(text):
    with pytest.raises(ValueError, match="acc1_drop<=NUMBER, kl<=NUMBER, bops<=NUMBER"):
        parse_budget(text, "acc1")


def test_bisection_finds_the_smallest():
    for answer in range(9):
        assert fewest(lambda n, answer=answer: n >= answer, 8) == answer
    with pytest.raises(ValueError, match="cannot be met"):
        fewest(lambda n: False, 8)
