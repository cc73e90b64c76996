"""Sensitivity: planted faults are found, and an interrupted run goes on."""

import itertools
import json
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from qswin.calib.lock import lock_file
from qswin.qat.mixed_precision.probe import group_quantizers
from qswin.qat.mixed_precision.sensitivity import measure_groups, start_report
from qswin.qat.quant.quantizers import quantizers
from tests.helpers import fails, invoke
from tests.qat.mixed_precision.conftest import BAD


def test_a_bad_range_is_ranked_first_alone_and_when_left_out(probe, tmp_path):
    groups = group_quantizers(probe.model, "site")
    assert {q.site.removesuffix(".weight") for q in quantizers(probe.model)} == set(groups)
    rows = measure_groups(probe, groups, {"rows": []}, tmp_path / "s.json")
    assert rows[0]["name"] == BAD and rows[0]["alone"]["kl"] > 10 * rows[1]["alone"]["kl"]
    assert min(rows, key=lambda row: row["without"]["kl"])["name"] == BAD
    assert probe.measure([])["kl"] == 0


def test_a_row_is_what_switching_by_hand_gives(probe, tmp_path):
    name = "layers.1.blocks.0.attn.qkv"
    row = measure_groups(probe, {name: group_quantizers(probe.model, "site")[name]}, {"rows": []}, tmp_path / "s.json")[
        0
    ]
    images = torch.from_numpy(np.concatenate([batch.images for batch in probe.batches]))
    with torch.no_grad():
        probe.switch([])
        floating = probe.model(images)
        for quantizer in quantizers(probe.model):
            if quantizer.site in (name, f"{name}.weight"):
                quantizer.enable()
        alone = probe.model(images)
    ours, reference = (
        logits.double().log_softmax(1) for logits in (alone, floating)
    )  # a small KL is rounding in float32
    expected = F.kl_div(ours, reference, log_target=True, reduction="batchmean").item()
    assert row["alone"]["kl"] == pytest.approx(expected, rel=1e-3)


def test_an_interrupted_run_goes_on(probe, tmp_path):
    """Rows that are there are kept as they are; another job's file is refused."""
    groups = dict(itertools.islice(group_quantizers(probe.model, "site").items(), 3))
    first = next(iter(groups))
    kept = {"name": first, "sites": [first], "alone": {"kl": 99.0}, "without": {"kl": 0.0}}
    report = {"job": {"seed": 0}, "rows": [kept]}
    rows = measure_groups(probe, groups, report, tmp_path / "s.json")
    assert rows[0] == kept and {row["name"] for row in rows} == set(groups)
    assert (
        start_report(tmp_path / "s.json", {"seed": 0})["rows"] == json.loads((tmp_path / "s.json").read_text())["rows"]
    )
    with pytest.raises(ValueError, match="seed was 0, now 1"):
        start_report(tmp_path / "s.json", {"seed": 1})
    for text, words in (
        ("[]", "not a JSON object"),
        ('{"kind": "evaluation"}', "not a sensitivity report"),
        ("{", "cut off"),
    ):
        (tmp_path / "t.json").write_text(text)
        with pytest.raises(ValueError, match=words):
            start_report(tmp_path / "t.json", {})


def test_one_job_writes_a_report(checkpoint, data, tmp_path, capsys):
    """Two that add rows to one file would lose rows; what a killed one left half written goes."""
    path = tmp_path / "new" / "s.json"
    common = ["--checkpoint", checkpoint, "--data", data / "train", "--images", 4, "--device", "cpu", "--by", "layer"]
    with lock_file(path, "--json"):
        (half := path.with_name(".s.json.0123abcd")).touch()
        line = fails(capsys, "sensitivity", *common, "--json", path)
        assert f"{path}: process {os.getpid()} on " in line and "choose another --json FILE" in line
        assert half.exists()
    assert invoke("sensitivity", *common, "--json", path) == 0
    assert [file.name for file in path.parent.iterdir()] == ["s.json"]


def test_an_unreadable_image_is_skipped_on_request(checkpoint, data, tmp_path, capsys):
    (data / "train" / "class0" / "0.png").write_bytes(b"no image")
    common = ["--checkpoint", checkpoint, "--data", data / "train", "--images", 20, "--device", "cpu", "--by", "layer"]
    assert "--skip-unreadable" in fails(capsys, "sensitivity", *common, "--json", tmp_path / "s.json")
    assert invoke("sensitivity", *common, "--json", tmp_path / "s.json", "--skip-unreadable") == 0
