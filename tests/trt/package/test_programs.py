"""client.py and the preprocessing step, with the files of the package alone, against calib.data.images."""

import dataclasses
import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import onnxruntime
import pytest
from PIL import Image

from qswin.calib.data.images import Preprocessing, load_image
from tests.helpers import invoke
from tests.trt.package.conftest import HOW, LABELS, save_graph, save_photos
from tests.trt.package.programs import Tensor, load, load_step

HOWS = {
    "square": HOW,
    "no crop": Preprocessing(size=(24, 24), crop_pct=1.0, interpolation="bilinear", mean=(0, 0, 0), std=(1, 1, 1)),
    "rectangle": Preprocessing(size=(20, 36), crop_pct=0.875),
    "squash": Preprocessing(size=(32, 20), crop_pct=1.0, crop_mode="squash", mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4)),
}


def packaged(tmp_path, how=HOW, batch="batch"):
    """A package of a graph, with a model repository."""
    save_graph(tmp_path / "run" / "a.onnx", batch, preprocessing=how.to_dict())
    assert invoke("package", tmp_path / "run", "--out", tmp_path / "deploy", "--triton") == 0
    return tmp_path / "deploy"


def files_of(photos):
    return np.array([path.read_bytes() for path in photos], dtype=object)


@pytest.mark.parametrize("how", HOWS.values(), ids=HOWS)
def test_both_preprocess_as_the_images_module(tmp_path, monkeypatch, how):
    folder, photos = packaged(tmp_path, how), save_photos(tmp_path / "photos")
    expected = np.stack([load_image(path, how) for path in photos])
    known, client = json.loads((folder / "preprocessing.json").read_text()), load(folder / "client.py")
    np.testing.assert_array_equal(np.stack([client.preprocess(path, known) for path in photos]), expected)
    execute = load_step(folder / "models" / "a_onnx_preprocess", monkeypatch)
    for shape in ((-1, 1), (-1,)):
        (response,) = execute([[Tensor("image", files_of(photos).reshape(shape))]])
        (pixels,) = response.tensors
        assert response.error is None and pixels.name == "pixels" and pixels.values.dtype == np.float32
        np.testing.assert_array_equal(pixels.values, expected)


def test_a_broken_image_fails_its_own_request_only(tmp_path, monkeypatch):
    folder, photos = packaged(tmp_path), save_photos(tmp_path / "photos")
    execute = load_step(folder / "models" / "a_onnx_preprocess", monkeypatch)
    broken, whole = execute([[Tensor("image", np.array([b"no image"], object))], [Tensor("image", files_of(photos))]])
    assert "cannot be read as an image (UnidentifiedImageError" in broken.error and not broken.tensors
    assert whole.error is None and len(whole.tensors[0].values) == len(photos)


def classify(folder, *arguments):
    """(exit code, standard output, standard error) of client.py where qswin cannot be imported."""
    command = [sys.executable, "-I", "-c", CLIENT, str(folder / "client.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    return done.returncode, done.stdout, done.stderr


CLIENT = """
import runpy, sys
sys.modules["qswin"] = sys.modules["torch"] = None
del sys.argv[0]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def expected_output(folder, photos):
    session = onnxruntime.InferenceSession(folder / "a.onnx")
    batch = session.get_inputs()[0].shape[0]
    lines = []
    for path in photos:
        pixels = load_image(path, HOW)[None]
        logits = session.run(None, {"input": np.repeat(pixels, batch if isinstance(batch, int) else 1, 0)})[0][0]
        shares = np.exp(np.float64(logits)) / np.exp(np.float64(logits)).sum()
        lines += [str(path), *(f"{shares[each]:8.4f}  {LABELS[each]}" for each in np.argsort(-logits)[:2])]
    return lines


@pytest.mark.parametrize("batch", ["batch", 4])
def test_the_client_prints_the_classes(tmp_path, batch):
    folder, photos = packaged(tmp_path, batch=batch), save_photos(tmp_path / "photos")
    code, out, err = classify(folder, "--top", 2, *photos)
    assert (code, err) == (0, "") and out.splitlines() == expected_output(folder, photos)
    code, out, _ = classify(folder, "--raw", tmp_path / "pixels", *photos[:2])
    assert (code, out) == (0, "")
    raw = np.fromfile(tmp_path / "pixels", "<f4").reshape(2, 3, 24, 24)
    np.testing.assert_array_equal(raw, [load_image(path, HOW) for path in photos[:2]])


def test_the_client_says_what_is_wrong(tmp_path):
    folder = packaged(tmp_path)
    (bad := tmp_path / "bad.png").write_bytes(b"no image")
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "float.tiff")
    for arguments, words in (
        ([bad], f"{bad}: cannot be read as an image"),
        ([tmp_path / "float.tiff"], "32-bit pixels"),
        ([bad, "--server", "http://localhost:9"], "--server needs --model"),
        ([folder / "none.png"], "none.png: cannot be read"),
        ([bad, "--server", "http://127.0.0.1:9", "--model", "x"], "refused"),
    ):
        code, _, err = classify(folder, *arguments)
        assert code == 2 and words in err and len(err.splitlines()) == 1


class Server(BaseHTTPRequestHandler):
    """As much of Triton's HTTP interface as the client uses: the ensemble of the packaged step and graph."""

    def log_message(self, *arguments):
        pass

    def answer(self, body, **headers):
        self.send_response(200)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        assert self.path == "/v2/models/a_onnx_ensemble"
        self.answer(json.dumps({"inputs": [{"name": "image", "shape": self.server.shape}]}).encode())

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        head, data = np.split(np.frombuffer(body, np.uint8), [int(self.headers["Inference-Header-Content-Length"])])
        (asked,) = json.loads(head.tobytes())["inputs"]
        assert (asked["datatype"], asked["parameters"]["binary_data_size"]) == ("BYTES", len(data))
        assert len(asked["shape"]) == len(self.server.shape)
        files = np.array(split(data.tobytes()), dtype=object).reshape(asked["shape"])
        (response,) = self.server.execute([[Tensor("image", files)]])
        logits = self.server.session.run(None, {"input": response.tensors[0].values})[0]
        described = {"name": "logits", "datatype": "FP32", "shape": logits.shape}
        described["parameters"] = {"binary_data_size": logits.nbytes}
        text = json.dumps({"outputs": [described]}).encode()
        self.answer(text + logits.tobytes(), Inference_Header_Content_Length=str(len(text)))


def split(data):
    """Triton's BYTES: each with its length, a little-endian uint32, before it."""
    found = []
    while data:
        end = 4 + int.from_bytes(data[:4], "little")
        found.append(data[4:end])
        data = data[end:]
    return found


@pytest.mark.parametrize(("batch", "shape"), [("batch", [-1, 1]), (4, [4])])
def test_the_client_asks_a_server(tmp_path, monkeypatch, batch, shape):
    folder, photos = packaged(tmp_path, batch=batch), save_photos(tmp_path / "photos")
    server = HTTPServer(("127.0.0.1", 0), Server)
    server.shape = shape
    server.execute = load_step(folder / "models" / "a_onnx_preprocess", monkeypatch)
    server.session = onnxruntime.InferenceSession(folder / "models" / "a_onnx" / "1" / "model.onnx")
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        url = f"http://127.0.0.1:{server.server_port}"
        code, out, err = classify(folder, "--top", 2, "--server", url, "--model", "a_onnx_ensemble", *photos)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert (code, err) == (0, "") and out.splitlines() == expected_output(folder, photos)


def test_every_field_of_preprocessing_is_written(tmp_path):
    known = json.loads((packaged(tmp_path) / "preprocessing.json").read_text())
    assert known.keys() - {"kind", "channels"} == {field.name for field in dataclasses.fields(Preprocessing)}
