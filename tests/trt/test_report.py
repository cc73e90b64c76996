"""The report of a run's folder: what it shows, and that it loads nothing from elsewhere."""

import argparse
import base64
import io
import json
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from trt.report import main, report

pytest.importorskip("matplotlib", reason="matplotlib is not installed")
SITE = "layers.0.blocks.0.attn.qkv._input_quantizer"
EVALUATION = {"backend": "onnxruntime 1", "precision": "int8", "acc1": 47.5, "images": 5000, "images_per_second": 99.0}
LOG = '{"step": 0, "loss": 2.0}\n{"step": 1, "epoch": 1, "acc1": 48.5}\n{"step": 2, "lo'  # the last line is being written


class Page(HTMLParser):
    """The tables and pictures of a page."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.pictures, self.headings, self.links, self._tag, self.classes = [], [], [], [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values, self._tag = dict(attributes), tag
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
            self.classes.append(values.get("class"))
        if tag == "img":
            self.pictures.append(values["src"])
        self.links += [values[name] for name in ("src", "href") if name in values]

    def handle_data(self, data):
        if self._tag in ("td", "th"):
            self.tables[-1][-1].append(data)
        if self._tag == "h2":
            self.headings.append(data)

    def handle_endtag(self, tag):
        self._tag = ""


def sensitive(name, kl):
    return {"name": name, "sites": [name], "alone": {"acc1": 47.0, "kl": kl}, "without": {"acc1": 46.0, "kl": 1.0}}


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "x"
    (folder / "overlays").mkdir(parents=True)
    row = {"model": "a.onnx", "backend": "onnxruntime", "precision": "int8", "ms": 100.0, "images_per_second": 10.0}
    layer = {"name": "conv", "kind": "Conv", "nodes": [], "inputs": ["INT8"], "outputs": ["INT8"], "ms": 0.25}
    records = {
        "a": EVALUATION,
        "b": {**EVALUATION, "backend": "<script>alert(1)</script>", "acc1": 48.25},
        "bench": {"rows": [{**row, "batch": 1}, {**row, "batch": 8}]},
        "sensitivity": {"job": {}, "rows": [sensitive("fc1", 0.001), sensitive("fc2", 0.01)]},
        "layers": {"model": "a.engine", "layers": [layer]},
    }
    for name, record in records.items():
        (folder / f"{name}.json").write_text(json.dumps(record))
    (folder / "log.jsonl").write_text(LOG)
    for stage, amax in (("ptq", 2.0), ("qat", 3.0)):
        save_file({f"{SITE}._amax": np.array(amax, np.float32), "head.weight": np.zeros(3)}, folder / f"{stage}.safetensors")
    Image.new("RGB", (4, 4)).save(folder / "overlays" / "worst.png")
    return folder


def test_everything_is_shown(run):
    page = Page(report(run))
    assert page.headings == ["Accuracy", "Speed", "Training", "Sensitivity", "Ranges", "Layers", "Worst images"]
    accuracy, speed, epochs, sensitivity, ranges, layers = page.tables
    assert accuracy[1] == ["a.json", "onnxruntime 1", "int8", "47.5", "5000", "99"]
    assert accuracy[2] == ["b.json", "<script>alert(1)</script>", "int8", "48.25", "5000", "99"]
    assert [line[3] for line in speed[1:]] == ["1", "8"]
    assert epochs == [["step", "epoch", "acc1"], ["1", "1", "48.5"]]
    assert [line[0] for line in sensitivity[1:]] == ["fc2", "fc1"]
    assert ranges[1:] == [[SITE, "2", "3", "1.5"]]
    assert layers[1:] == [["conv", "Conv", "INT8", "INT8", "0.25"]] and page.classes[-1] == "int8"


def test_it_is_one_file_that_loads_nothing(run):
    text = report(run)
    page = Page(text)
    assert len(page.pictures) == 5 and page.links == page.pictures
    for source in page.pictures:
        with Image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/png;base64,")))) as image:
            image.load()
    assert "<script>alert" not in text and "http" not in text


def test_the_command_writes_it_beside_the_files(run):
    made = run.parent / "made.json"
    main(argparse.Namespace(run=run, out=None, json=made))
    page = run / "report.html"
    assert page.read_text() == report(run)
    assert json.loads(made.read_text()) == {"page": str(page), "bytes": page.stat().st_size}


def test_what_cannot_be_reported_says_why(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        report(tmp_path / "x")
    with pytest.raises(ValueError, match="nothing to report"):
        report(tmp_path)
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ValueError, match=r"a\.json: not JSON, or cut off"):
        report(tmp_path)
    (tmp_path / "a.json").unlink()
    (tmp_path / "ptq.safetensors").write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match=r"ptq\.safetensors: truncated, or no checkpoint"):
        report(tmp_path)
