"""The greedy search against an exhaustive one, budgets, and the command."""

import itertools
import json

import numpy as np
import pytest
import torch
import yaml

from qswin.qat.checkpoint import load_checkpoint, save_checkpoint
from qswin.qat.config import load_config
from qswin.qat.distributed import process_group
from qswin.qat.mixed_precision import latency
from qswin.qat.mixed_precision.bit_operations import bit_operations
from qswin.qat.mixed_precision.probe import group_quantizers
from qswin.qat.mixed_precision.search import (
    Candidate,
    Found,
    budget_of,
    candidates,
    fewest,
    most_in_float,
    parse_budget,
    share_of_operations,
)
from qswin.qat.mixed_precision.sensitivity import measure_groups
from qswin.qat.ptq import job
from qswin.qat.quant.quantizers import quantizers
from qswin.qat.quant.recipe import named_recipe
from qswin.qat.quant.recipe_file import read_recipe
from qswin.qat.quant.rewrite import enable, quantize
from tests.helpers import fails, invoke, lively_swin
from tests.qat.mixed_precision.conftest import BAD


def test_the_commands_rank_and_find_a_recipe_that_calibrate_takes(checkpoint, data, config_file, tmp_path, capsys):
    """A damaged checkpoint: search leaves the damaged site in float, and little else."""
    model, description = load_checkpoint(checkpoint)
    next(q for q in quantizers(model) if q.site == BAD)._amax.mul_(0.01)
    save_checkpoint(tmp_path / "bad.safetensors", model, description)
    common = ["--checkpoint", tmp_path / "bad.safetensors", "--data", data / "train", "--images", 8, "--device", "cpu"]
    out, recipe = tmp_path / "s.json", tmp_path / "mixed.yaml"
    assert invoke("sensitivity", *common, "--json", out, "--plot", tmp_path / "s.png", "--top", 5) == 0
    assert (tmp_path / "s.png").stat().st_size > 5000 and BAD in capsys.readouterr().out.splitlines()[1]
    limit = 2 * json.loads(out.read_text())["rows"][1]["alone"]["kl"] + 0.05 * json.loads(out.read_text())["all"]["kl"]
    assert invoke("search", *common, "--sensitivity", out, "--budget", f"kl<={limit:.8f}", "--recipe", recipe) == 0
    config = load_config(config_file, [f"recipe={recipe}", f"run={tmp_path / 'mixed'}"])
    twin = quantize(lively_swin(), read_recipe(config.recipe))
    assert BAD not in {quantizer.site for quantizer in quantizers(twin)}
    assert len(list(quantizers(twin))) > 0.5 * len(list(quantizers(model)))
    with process_group("cpu") as ranks:
        job.run_calibration(config, ranks)


def test_flat_images_are_ranked_and_searched_by_kl(checkpoint, data, tmp_path, capsys):
    """Without labels there is no Acc@1: a budget on it says so, one on the KL is met."""
    (flat := tmp_path / "photos").mkdir()
    for index, file in enumerate(sorted((data / "train").rglob("*.png"))[:4]):
        (flat / f"{index}.png").write_bytes(file.read_bytes())
    common = ["--checkpoint", checkpoint, "--data", flat, "--images", 4, "--device", "cpu"]
    assert invoke("sensitivity", *common, "--by", "layer", "--json", tmp_path / "s.json") == 0
    assert set(json.loads((tmp_path / "s.json").read_text())["all"]) == {"kl"}
    search_for = [*common, "--sensitivity", tmp_path / "s.json", "--recipe", tmp_path / "mixed.yaml", "--budget"]
    capsys.readouterr()
    line = fails(capsys, "search", *search_for, "acc1_drop<=1")
    assert "--budget 'acc1_drop<=1': needs labels" in line and f"images of {flat} lie in no folder of a class" in line
    assert invoke("search", *search_for, "kl<=1000") == 0
    assert "no group has to stay in float for kl<=1000; " in capsys.readouterr().out


def test_a_budget_finer_than_one_image_is_a_warning(caplog):
    with caplog.at_level("WARNING", logger="absl"):
        budget_of("acc1_drop<=2.5", "acc1", 40, None)
        budget_of("kl<=1e-9", "acc1", 40, None)
        assert not caplog.text
        budget_of("acc1_drop<=2.4", "acc1", 40, None)
    assert "finer than one image: one image of 40 is 2.5 points of Acc@1" in caplog.text


@pytest.mark.parametrize(
    ("floats", "budget", "words"),
    [
        (0, "kl<=1", "no group has to stay in float for kl<=1"),
        (1, "acc1_drop<=0.5", "1 of 2 groups has to stay in float for acc1_drop<=0.5"),
        (2, "kl<=1", "2 of 2 groups have to stay in float"),
        (0, "latency<=3", "no group can stay in float for latency<=3"),
        (2, "bops<=0.5", "2 of 2 groups can stay in float for bops<=0.5"),
    ],
)
def test_what_is_found_is_said_in_a_sentence(floats, budget, words):
    groups = [Candidate(name, [name], 1.0, 1.0, 4.0) for name in "ab"]
    assert str(Found(named_recipe("gemm"), groups, floats, parse_budget(budget))).startswith(words)


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


def test_the_command_keeps_to_a_latency(checkpoint, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(latency, "measure_latency", lambda *given: 1 + len(given[2]))
    common = ["--checkpoint", checkpoint, "--data", data / "train", "--images", 4, "--device", "cpu"]
    assert invoke("sensitivity", *common, "--by", "layer", "--json", tmp_path / "s.json") == 0
    search_for = [*common, "--sensitivity", tmp_path / "s.json", "--recipe", tmp_path / "mixed.yaml", "--budget"]
    assert invoke("search", *search_for, "latency<=4", "--json", tmp_path / "found.json") == 0
    floats = [
        rule for rule in yaml.safe_load((tmp_path / "mixed.yaml").read_text())["rules"] if rule["quantize"] is False
    ]
    assert 2 <= len(floats) <= 3  # a layer has one site or two
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found["in_float"]) < len(floats) + 1 and len(found["in_float"] + found["quantized"]) == 35
    assert "latency is 1.000 with every site quantized, " in fails(capsys, "search", *search_for, "latency<=0.5")


def test_search_says_what_is_wrong_with_its_files(checkpoint, data, tmp_path, capsys):
    common = [
        "--checkpoint",
        checkpoint,
        "--data",
        data / "train",
        "--images",
        4,
        "--device",
        "cpu",
        "--budget",
        "kl<=1",
    ]
    report = tmp_path / "s.json"
    files = ["--sensitivity", report, "--recipe", tmp_path / "mixed.yaml"]
    for budget in ("kl<=nan", "kl<=1e400", "mAP<=1"):
        assert "--budget '" in fails(capsys, "search", *common, *files, "--budget", budget)
    assert "--recipe mixed: the name must end in" in fails(capsys, "search", *common, *files, "--recipe", "mixed")
    assert "no such file" in fails(capsys, "search", *common, *files)
    report.write_text('{"kind": "sensitivity", "rows": []}')
    assert "not a sensitivity report" in fails(capsys, "search", *common, *files)
    report.write_text('{"kind": "sensitivity", "rows": [], "job": {"checkpoint": "0"}}')
    assert "of another checkpoint" in fails(capsys, "search", *common, *files)
    assert not (tmp_path / "mixed.yaml").exists()


@pytest.mark.parametrize(
    "text", ["acc1_drop<0.1", "speed<=3", "kl<=", "acc1_drop<=-1", "kl<=1e400", "dice_drop<=1", ""]
)
def test_a_wrong_budget_lists_the_right_ones(text):
    with pytest.raises(ValueError, match="acc1_drop<=NUMBER, kl<=NUMBER, bops<=NUMBER"):
        parse_budget(text, "acc1")


def test_bisection_finds_the_smallest():
    for answer in range(9):
        assert fewest(lambda n, answer=answer: n >= answer, 8) == answer
    with pytest.raises(ValueError, match="cannot be met"):
        fewest(lambda n: False, 8)
