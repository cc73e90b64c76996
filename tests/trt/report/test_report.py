"""The report of a run's folder: what it shows, and that it loads nothing from elsewhere."""

import base64
import io
import json
import os
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from qswin.calib.calibrators import CALIBRATORS, find_range
from qswin.calib.data.batches import Batch
from qswin.calib.data.images import Preprocessing
from qswin.calib.grid import grid_of
from qswin.calib.histogram_file import HISTOGRAMS, Observation, save_histograms
from qswin.trt.evaluation.worst import WorstImages
from qswin.trt.report import plots
from qswin.trt.report.ranges import plot_of, read_ranges
from qswin.trt.report.sections import report, save_pictures
from qswin.trt.report.webpage import FOLDED, Gallery, Picture, page, table
from tests.helpers import fails, filled, invoke

pytest.importorskip("matplotlib", reason="matplotlib is not installed")
HISTOGRAMS_OF = 13  # quantizers
PICTURES = 5 + HISTOGRAMS_OF  # the loss, ranges before and after, speed, sensitivity, a worst image
SITE = "layers.0.blocks.0.attn.qkv._input_quantizer"
EVALUATION = {
    **{"kind": "evaluation", "backend": "onnxruntime 1", "precision": "int8"},
    **{"acc1": 47.5, "images": 5000, "images_per_second": 99.0},
}
COMPARISON = {"kind": "comparison", "model": "a.engine", "reference": "a.onnx", "top1_agreement": 99.5}
SEARCH = {"kind": "search", "recipe": "mixed.yaml", "budget": "kl<=0.01", "in_float": ["fc1", "fc2"]}
BUILD = {"kind": "build", "target": "tensorrt", "profile": [1, 8, 64], "seconds": 3.5}
EXPORT = {"kind": "export", "onnx": "a.onnx", "precision": "int8", "nodes": 100, "qdq_nodes": 60}
LOG = (
    '{"step": 0, "loss": 2.0}\n{"step": 1, "epoch": 1, "acc1": 48.5}\n{"step": 2, "lo'  # the last line is being written
)


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
        "bench": {"kind": "timing", "rows": [{**row, "batch": 1}, {**row, "batch": 8}]},
        "sensitivity": {
            **{"kind": "sensitivity", "job": {}, "float": {"acc1": 48.0, "kl": 0.0}, "all": {"acc1": 45.0, "kl": 0.5}},
            "rows": [sensitive("fc1", 0.001), sensitive("fc2", 0.01)],
        },
        "inspected": {"kind": "layers", "model": "a.engine", "layers": [layer]},
        **{"compared": COMPARISON, "searched": SEARCH, "built": BUILD, "exported": EXPORT},
        "a.engine": {"kind": "engine", "layers": "its own", "rows": 1, "precision": "int8", "acc1": 1.0},
        "of another program": {"rows": [1], "layers": [], "precision": 1},
    }
    for name, record in records.items():
        (folder / f"{name}.json").write_text(json.dumps(record))
    (folder / "log.jsonl").write_text(LOG)
    for stage, amax in (("ptq", 2.0), ("qat", 3.0)):
        save_file(
            {f"{SITE}._amax": np.array(amax, np.float32), "head.weight": np.zeros(3)}, folder / f"{stage}.safetensors"
        )
    Image.new("RGB", (4, 4)).save(folder / "pictures" / "worst.png")
    save_histograms(folder / HISTOGRAMS, {f"{SITE[:-10]}{i}_quantizer": observation() for i in range(HISTOGRAMS_OF)})
    return folder


def observation():
    return Observation(filled(np.random.default_rng(0).standard_normal(1000).astype(np.float32)), "int4")


def html(run):
    return page(f"qswin: {run.name}", report(run))


def test_everything_is_shown(run):
    shown = Page(html(run))
    assert shown.headings == [
        *("Summary", "Accuracy", "Speed", "Training", "Sensitivity", "Ranges", "Histograms", "Layers", "Worst images"),
        *("Comparisons", "Mixed precision", "Exports", "Builds", "Skipped"),
    ]
    summed, accuracy, speed, epochs, sensitivity, ranges, layers, *listed = shown.tables
    comparisons, searches, exports, builds, skipped = listed
    assert summed == [["model", "on", "precision", "batch", "ms"], ["a.onnx", "onnxruntime", "int8", "1", "100"]]
    assert skipped == [["file", "reason"], ["of another program.json", "not a result of qswin"]]
    assert accuracy[1] == ["a.json", "onnxruntime 1", "int8", "47.5", "5000", "99"]
    assert accuracy[2] == ["b.json", "<script>alert(1)</script>", "int8", "48.25", "5000", "99"]
    assert [line[3] for line in speed[1:]] == ["1", "8"]
    assert epochs == [["step", "epoch", "acc1"], ["1", "1", "48.5"]]
    assert sensitivity[0] == ["quantized", "alone: acc1", "alone: kl", "all but it: acc1", "all but it: kl"]
    assert [line[0] for line in sensitivity[1:]] == ["fc2", "fc1", "everything"]
    assert sensitivity[3][1:] == ["45", "0.5", "48", "0"]
    assert ranges[1:] == [[SITE, "2", "3", "1.5"]]
    assert layers[1:] == [["conv", "Conv", "INT8", "INT8", "0.25"]] and shown.classes.count("int8") == 1
    assert comparisons == [
        ["file", "model", "reference", "top1 agreement"],
        ["compared.json", "a.engine", "a.onnx", "99.5"],
    ]
    assert searches[1] == ["searched.json", "mixed.yaml", "kl<=0.01", "fc1, fc2"]
    assert exports[1] == ["exported.json", "a.onnx", "int8", "100", "60"]
    assert builds[1] == ["built.json", "tensorrt", "1, 8, 64", "3.5"]


def test_it_is_one_file_that_loads_nothing(run):
    text = html(run)
    shown = Page(text)
    assert (
        len(shown.pictures) == PICTURES and [link for link in shown.links if not link.startswith("#")] == shown.pictures
    )
    for source in shown.pictures:
        with Image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/png;base64,")))) as image:
            image.load()
    assert "<script>alert" not in text and "http" not in text


def test_the_command_writes_it_and_its_pictures_beside_the_files(run):
    made = run.parent / "made.json"
    assert invoke("report", run, "--json", made) == 0
    written = run / "report.html"
    assert written.read_text() == html(run)
    expected = {"kind": "report", "page": str(written), "bytes": written.stat().st_size, "pictures": PICTURES}
    assert json.loads(made.read_text()).items() >= expected.items()
    embedded = [base64.b64decode(source.partition(",")[2]) for source in Page(written.read_text()).pictures]
    assert [path.read_bytes() for path in sorted((run / "report-pictures").iterdir())] == embedded


def test_the_names_of_many_pictures_sort_as_the_page_does(tmp_path):
    shown = [Picture(bytes([number]), "x") for number in range(101)]
    assert save_pictures({"Y": [Gallery(shown)]}, tmp_path) == 101
    assert [path.read_bytes() for path in sorted(tmp_path.iterdir())] == [each.png for each in shown]


def test_weights_are_drawn_by_channel(tmp_path):
    """A range is told as a share of its channel's largest weight; a channel of zeros has none."""
    weight = np.array([[1.0, -4.0], [2.0, 0.5], [0, 0], [1, 1]], np.float32)
    amax = np.array([[2.0], [2.0], [1.0], [0.75]], np.float32)
    save_file({"fc.weight": weight, "fc._weight_quantizer._amax": amax}, tmp_path / "ptq.safetensors")
    save_histograms(
        tmp_path / HISTOGRAMS, {"fc._weight_quantizer": observation(), "fc._input_quantizer": observation()}
    )
    read = read_ranges(tmp_path / "ptq.safetensors")
    assert read.shares == {"fc._weight_quantizer": 0.75} and read.largest == {"fc._weight_quantizer": 2.0}
    save_file({"fc._weight_quantizer._amax": amax}, tmp_path / "cut.safetensors")
    with pytest.raises(ValueError, match=r"fc\._weight_quantizer is there, but not fc\.weight"):
        read_ranges(tmp_path / "cut.safetensors")
    of_inputs, inputs, of_weights, weights = report(tmp_path)["Histograms"]
    assert "|x|" in of_inputs and "share of its channel" in of_weights
    captions = [[picture.caption for picture in gallery.pictures] for gallery in (inputs, weights)]
    assert captions == [["fc._input_quantizer"], ["fc._weight_quantizer"]]


def test_a_histogram_is_drawn_with_every_range():
    """The bars hold every value that was counted; a line stands at each calibrator's range and each checkpoint's."""
    axes, seen = plots.pyplot().figure().subplots(), observation()
    plot_of(SITE, seen, {"ptq": {SITE: 1.25}, "qat": {"other": 3.0}}, CALIBRATORS)(axes)
    (bars,) = axes.patches
    assert bars.get_data().values.sum() == pytest.approx(1000)
    lines = {line.get_label().split()[0]: line.get_xdata()[0] for line in axes.lines}
    assert lines == {name: find_range(seen.histogram, name, grid_of("int4")) for name in CALIBRATORS} | {"ptq": 1.25}
    assert axes.get_title() == "layers.0.blocks.0.attn.qkv._input, int4"


def test_results_without_a_kind_are_named(run):
    """Their keys are not guessed from: an older qswin made them."""
    old = {key: value for key, value in EVALUATION.items() if key != "kind"} | {"command": ["qswin", "evaluate"]}
    (run / "old.json").write_text(json.dumps(old))
    text = html(run)
    shown = Page(text)
    assert len(shown.tables[1]) == 3 and shown.headings[-1] == "Skipped"
    assert ["old.json", "made by an older qswin; run the command again"] in shown.tables[-1]


def test_old_results_alone_are_nothing_to_report(tmp_path):
    (tmp_path / "old.json").write_text('{"rows": [], "command": []}')
    with pytest.raises(ValueError, match=r"nothing to report \(old\.json: made by an older qswin"):
        report(tmp_path)


@pytest.mark.parametrize(("kind", "key"), [("timing", "rows"), ("sensitivity", "rows"), ("layers", "layers")])
@pytest.mark.parametrize("rows", [None, 1, [1], [{"model": "a.onnx"}]])
def test_a_result_without_its_rows_is_named(tmp_path, kind, key, rows):
    (tmp_path / "a.json").write_text(json.dumps({"kind": kind, key: rows}))
    with pytest.raises(ValueError, match=f"nothing to report .a.json: its '{key}' are not rows"):
        report(tmp_path)


ROW = {"model": "a", "backend": "b", "precision": "int8", "batch": 1, "ms": 1.0, "images_per_second": 1.0}


def link_twice(path):
    (between := path.with_suffix(".between")).symlink_to("/dev/zero")
    path.symlink_to(between.name)


ODD = {
    "links out": (lambda path: path.symlink_to("/etc/passwd"), "a link to a file outside of the folder"),
    "FIFO": (os.mkfifo, "not a regular file"),
    "folder": (os.mkdir, "not a regular file"),
    "links to a link out": (link_twice, "a link to a file outside of the folder"),
    "too large": (lambda path: (path.touch(), os.truncate(path, 1 << 40)), "larger than"),
}


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize(
    "name", ["a1.json", "log.jsonl", "pictures/s.png", "ptq.safetensors", HISTOGRAMS, "x.safetensors.json"]
)
def test_only_regular_files_of_the_folder_are_shown(tmp_path, odd, name):
    make, reason = ODD[odd]
    (tmp_path / "a.json").write_text(json.dumps(EVALUATION))
    (tmp_path / "pictures").mkdir()
    make(tmp_path / name)
    shown = report(tmp_path)
    assert list(shown) == ["Accuracy", "Skipped"]
    ((_, (file, told)),) = Page(page("x", shown)).tables[-1:]
    assert file == name and told.startswith(reason)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("pictures/s.png", "root:x:0:0", "not a PNG"),
        ("pictures/s.png", "\x89PNG\r\n\x1a\n cut", "not a PNG"),
        ("a1.json", "{", "not JSON, or cut off"),
        ("a1.json", '{"kind": "spam", "rows": [1]}', "not a result of qswin"),
        ("a1.json", json.dumps({"kind": "timing", "rows": [ROW | {"ms": "1"}]}), "its 'rows' are not rows of model"),
        ("a1.json", json.dumps({"kind": "timing", "rows": [ROW | {"batch": 10**400}]}), "its 'rows' are not rows"),
        ("a1.json", json.dumps({"kind": "timing", "rows": [ROW] * 1001}), "it has more than 1000 rows"),
        (
            "a1.json",
            json.dumps({"kind": "sensitivity", "rows": [{"name": "x", "alone": {"kl": []}, "without": {}}]}),
            "its metrics are not numbers",
        ),
        ("log.jsonl", "[1]\n{}", "not the log of a training"),
        ("log.jsonl", '{"step": 1, "loss": "x"}', "not the log of a training"),
        ("ptq.safetensors", "no checkpoint", "truncated, or not a checkpoint"),
        (HISTOGRAMS, "no zip", "truncated, or not a file of histograms"),
    ],
)
def test_what_is_not_of_its_kind_is_skipped(tmp_path, name, content, reason):
    (tmp_path / "a.json").write_text(json.dumps(EVALUATION))
    (tmp_path / "pictures").mkdir()
    (tmp_path / name).write_bytes(content.encode("latin-1"))
    ((_, (file, told)),) = Page(html(tmp_path)).tables[-1:]
    assert file == name and told.startswith(reason)


def test_a_link_inside_the_folder_is_followed(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(EVALUATION))
    (tmp_path / "b.json").symlink_to("a.json")
    assert [line[0] for line in Page(html(tmp_path)).tables[0][1:]] == ["a.json", "b.json"]


def test_names_with_dollars_are_no_formulas(tmp_path):
    row = ROW | {"model": r"$\frac$ \x1b " + "x" * 500}
    (tmp_path / "a.json").write_text(json.dumps({"kind": "timing", "rows": [row, row]}))
    assert list(report(tmp_path)) == ["Summary", "Speed"]


def test_the_page_must_be_called_html(run, capsys):
    """A slip must not write the page over a checkpoint."""
    before = (run / "ptq.safetensors").read_bytes()
    assert "--out" in (line := fails(capsys, "report", run, "--out", run / "ptq.safetensors")) and ".html" in line
    assert (run / "ptq.safetensors").read_bytes() == before


def test_a_plot_fills_its_picture(tmp_path):
    """Fitted, or with margins that leave a quarter of the height free below."""

    def fill(axes):
        axes.axis("off")
        axes.add_patch(plots.pyplot().Rectangle((0, 0), 1, 1, color="black", transform=axes.transAxes))

    for margins, share in ((None, 0.9), ((0, 0.25, 1, 1), 0.7)):
        plots.save(fill, tmp_path / "plot.png", pixels=640, margins=margins)
        with Image.open(tmp_path / "plot.png") as image:
            dark = np.asarray(image.convert("L")) < 128
        assert share < dark.mean() < share + 0.1
        assert margins is None or (dark.shape[1] == 640 and not dark[-dark.shape[0] // 5 :].any())


def test_long_tables_and_galleries_are_folded():
    """What is longer than a screen opens on a click on its length."""
    short, long = (table(["a"], [[i] for i in range(count)]) for count in (FOLDED, FOLDED + 1))
    assert "<details" not in short and f"<details><summary>{FOLDED + 1} rows</summary>" in long
    assert len(Page(long).tables[0]) == FOLDED + 2
    few, many = (page("x", {"Y": [Gallery([Picture(b"", "z")] * count)]}) for count in (FOLDED, FOLDED + 1))
    assert "<details" not in few and f"<details><summary>{FOLDED + 1} pictures</summary>" in many


def test_a_worst_image_is_told_in_words(tmp_path):
    """Its caption is what `evaluate --pictures` wrote into the PNG, or else its name."""
    evaluated = WorstImages(tmp_path / "pictures", 1, ("<people>", "buildings"), Preprocessing(size=(8, 8)))
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    evaluated.update(np.array([[0.0, np.log(9.0)]]), Batch(np.zeros(0), np.array([0]), [tmp_path / "a.png"]))
    evaluated.draw()
    Image.new("RGB", (8, 8)).save(tmp_path / "pictures" / "z.png")
    (gallery,) = report(tmp_path)["Worst images"]
    assert [each.caption for each in gallery.pictures] == ["true <people> (p = 0.10), predicted buildings; a", "z"]
    assert "true &lt;people&gt;" in html(tmp_path)


def test_ranges_that_training_left_alone_are_not_drawn(tmp_path):
    for stage in ("ptq", "qat"):
        save_file({f"{SITE}._amax": np.array(2.0, np.float32)}, tmp_path / f"{stage}.safetensors")
    (listed,) = report(tmp_path)["Ranges"]
    assert Page(listed).tables[0][1:] == [[SITE, "2", "2", "1"]]


def test_what_cannot_be_reported_says_why(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        report(tmp_path / "x")
    with pytest.raises(ValueError, match="nothing to report"):
        report(tmp_path)
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ValueError, match=r"nothing to report \(a\.json: not JSON, or cut off"):
        report(tmp_path)
