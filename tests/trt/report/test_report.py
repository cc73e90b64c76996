"""The report of a run's folder: what it shows, and that it loads nothing from elsewhere."""

import base64
import io
import json
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from qswin.calib.calibrators import CALIBRATORS, find_range
from qswin.calib.grid import grid_of
from qswin.calib.histogram_file import HISTOGRAMS, Observation, save_histograms
from qswin.trt.report import plots
from qswin.trt.report.report import panel, report, weight_shares
from qswin.trt.report.webpage import page
from tests.helpers import filled, invoke

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
    return make_run(tmp_path / "x")


def make_run(folder):
    """A folder with a file of every kind that a report shows."""
    (folder / "pictures").mkdir(parents=True)
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
    Image.new("RGB", (4, 4)).save(folder / "pictures" / "worst.png")
    save_histograms(folder / HISTOGRAMS, {f"{SITE[:-10]}{i}_quantizer": observation() for i in range(13)})
    return folder


def observation():
    return Observation(filled(np.random.default_rng(0).standard_normal(1000).astype(np.float32)), 4)


def html(run):
    return page(f"qswin: {run.name}", report(run))


def test_everything_is_shown(run):
    shown = Page(html(run))
    assert shown.headings == [
        *("Accuracy", "Speed", "Training", "Sensitivity", "Ranges", "Histograms", "Layers", "Worst images")
    ]
    accuracy, speed, epochs, sensitivity, ranges, layers = shown.tables
    assert accuracy[1] == ["a.json", "onnxruntime 1", "int8", "47.5", "5000", "99"]
    assert accuracy[2] == ["b.json", "<script>alert(1)</script>", "int8", "48.25", "5000", "99"]
    assert [line[3] for line in speed[1:]] == ["1", "8"]
    assert epochs == [["step", "epoch", "acc1"], ["1", "1", "48.5"]]
    assert [line[0] for line in sensitivity[1:]] == ["fc2", "fc1"]
    assert ranges[1:] == [[SITE, "2", "3", "1.5"]]
    assert layers[1:] == [["conv", "Conv", "INT8", "INT8", "0.25"]] and shown.classes[-1] == "int8"


def test_it_is_one_file_that_loads_nothing(run):
    text = html(run)
    shown = Page(text)
    assert len(shown.pictures) == 7 and shown.links == shown.pictures
    for source in shown.pictures:
        with Image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/png;base64,")))) as image:
            image.load()
    assert "<script>alert" not in text and "http" not in text


def test_the_command_writes_it_and_its_pictures_beside_the_files(run):
    made = run.parent / "made.json"
    assert invoke("report", run, "--json", made) == 0
    written = run / "report.html"
    assert written.read_text() == html(run)
    assert json.loads(made.read_text()) == {"page": str(written), "bytes": written.stat().st_size, "pictures": 7}
    embedded = [base64.b64decode(source.partition(",")[2]) for source in Page(written.read_text()).pictures]
    assert [path.read_bytes() for path in sorted((run / "report-pictures").iterdir())] == embedded


def test_weights_are_drawn_by_channel(tmp_path):
    """A range is told as a share of its channel's largest weight; a channel of zeros has none."""
    weight = np.array([[1.0, -4.0], [2.0, 0.5], [0, 0], [1, 1]], np.float32)
    amax = np.array([[2.0], [2.0], [1.0], [0.75]], np.float32)
    save_file({"fc.weight": weight, "fc._weight_quantizer._amax": amax}, tmp_path / "ptq.safetensors")
    save_histograms(tmp_path / HISTOGRAMS, {"fc._weight_quantizer": observation(), "fc._input_quantizer": observation()})
    assert weight_shares(tmp_path / "ptq.safetensors") == {"fc._weight_quantizer": 0.75}
    save_file({"fc._weight_quantizer._amax": amax}, tmp_path / "cut.safetensors")
    with pytest.raises(ValueError, match="_amax has no fc.weight"):
        weight_shares(tmp_path / "cut.safetensors")
    captions = [part.caption for part in report(tmp_path)["Histograms"]]
    assert captions == [
        "histograms of |x|, from fc._input_quantizer on",
        "histograms of |w| as a share of its channel's largest, from fc._weight_quantizer on",
    ]


def test_a_histogram_is_drawn_with_every_range():
    """The bars hold every value that was counted; a line stands at each calibrator's range and each checkpoint's."""
    axes, seen = plots.pyplot().figure().subplots(), observation()
    panel(SITE, seen, {"ptq": {SITE: 1.25}, "qat": {"other": 3.0}}, CALIBRATORS)(axes)
    (bars,) = axes.patches
    assert bars.get_data().values.sum() == pytest.approx(1000)
    lines = {line.get_label().split()[0]: line.get_xdata()[0] for line in axes.lines}
    assert lines == {name: find_range(seen.histogram, name, grid_of("int4")) for name in CALIBRATORS} | {"ptq": 1.25}
    assert axes.get_title() == "layers.0.blocks.0.attn.qkv._input, int4"


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
