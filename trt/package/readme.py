"""The README of a package: its files, its figures, and the commands that run each file."""

from collections.abc import Sequence
from pathlib import Path

from qswin.trt.engines.engine import SUFFIXES as ENGINES
from qswin.trt.package.artefacts import BUNDLE, ONNX, PACKAGE, Artefact
from qswin.trt.package.figures import figures, markdown_table
from qswin.trt.package.triton import BACKENDS, ENSEMBLE, is_served, largest_batch, model_name

SUPPORT = "https://docs.nvidia.com/deeplearning/frameworks/support-matrix/"
START = """\
# {title}

A classifier of {count} classes, made with `qswin package`. `labels.txt` names the classes, a line each.
`preprocessing.json` says how an image becomes the input, (N, 3, {height}, {width}) float32: RGB, resized, cropped,
(value / 255 - mean) / std. `preprocess.py` does it.

## Files

{files}

Engines, packages and bundles are code: run only those that you built yourself.

## Figures

{figures}"""
CLIENT = """
## On a CPU

```sh
pip install numpy pillow onnxruntime
python client.py --model {model} photo.jpg
docker build --tag classify .
docker run --rm --volume "$PWD:/images" classify --model /classify/{model} /images/photo.jpg
```
"""
BUNDLES = """
## In C++, on an NVIDIA GPU

`main.cpp` uses `qswin.h`, from the folder `cpp/` of qswin's repository. `CUDA` is the folder of `cuda.h`.

```sh
cmake -S . -B build -D QSWIN_SOURCE=qswin/cpp -D QSWIN_CUDA_INCLUDE=CUDA
cmake --build build
python client.py --raw pixels.f32 photo.jpg
build/classify {bundle} pixels.f32 labels.txt
docker build --file Dockerfile.bundle --build-context qswin=qswin/cpp --tag classify-bundle .
```
"""
QSWIN = """
## With qswin

The files that Python runs through qswin, on the machine that each is built for:

```sh
{lines}
```
"""
TRITON = """
## On a Triton server

`models/` is a model repository. For each file it has the model itself, a step that decodes and preprocesses image files
in the Python backend, and an ensemble of both, which takes the bytes of image files.

{models}

```sh
docker build --file Dockerfile.triton --tag classify-triton .
docker run --rm --gpus all --publish 8000:8000 classify-triton
python client.py --server http://localhost:8000 --model {ensemble} photo.jpg
```

No Triton server was run to make this: the configs are checked against the server's own schema.
"""
NOTES = {
    ONNX: "ONNX graphs run on the server's CPU. One without VNNI sums INT8 products in 16 bits, which overflow:"
    " compare with `client.py` there.",
    PACKAGE: "The PyTorch backend takes packages (`torch_aoti`) with these tensor names since 26.05, and does not batch"
    " them. The image's PyTorch must be the one that built the package.",
}
ENGINE_NOTE = (
    f"The image's TensorRT must be the one that built the engine: NVIDIA's [support matrix]({SUPPORT}) lists both; give"
    " the tag with `--build-arg TRITON=XX.YY-py3`."
)
PLUGIN_NOTE = "{file} needs `{plugin}`: start the server with `--backend-config=tensorrt,plugins=/path/of/{plugin}`."


def readme(run: Path, artefacts: Sequence[Artefact], triton: bool) -> str:
    """The text.

    Args:
        run: the folder whose JSON results are shown.
        triton: there is a model repository.
    """
    first = artefacts[0]
    height, width = first.preprocessing.size
    names = [artefact.path.name for artefact in artefacts]
    values = {"title": run.resolve().name, "count": len(first.labels), "height": height, "width": width}
    text = START.format(**values, files=files(artefacts), figures=figures(run, names))
    for suffix, section, key in ((ONNX, CLIENT, "model"), (BUNDLE, BUNDLES, "bundle")):
        if own := [name for name in names if name.endswith(suffix)]:
            text += section.format(**{key: own[0]})
    if built := [artefact for artefact in artefacts if artefact.suffix in (*ENGINES, PACKAGE)]:
        lines = "\n".join(f"qswin evaluate --model {each.path.name} --data DIR{plugin_flag(each)}" for each in built)
        text += QSWIN.format(lines=lines)
    return text + (triton_section(artefacts) if triton else "")


def plugin_flag(artefact: Artefact) -> str:
    plugin = artefact.built.plugin if artefact.built else None
    return f" --plugin {plugin}" if plugin else ""


def files(artefacts: Sequence[Artefact]) -> str:
    """What each file is, and what it runs on."""
    rows = [{"file": f"`{each.path.name}`", "runs on": runs_on(each), "batches": batches(each)} for each in artefacts]
    return markdown_table(("file", "runs on", "batches"), rows)


def runs_on(artefact: Artefact) -> str:
    """TensorRT 8.6.1, NVIDIA H200."""
    built = artefact.built
    if built is None:
        return "ONNX Runtime"
    if built.architectures:
        return f"qswin's runner, architectures {', '.join(map(str, built.architectures))}"
    capability = f"compute capability {built.capability}" if built.capability else None
    return ", ".join(filter(None, (f"{built.target} {built.version}", built.gpu, capability)))


def batches(artefact: Artefact) -> str:
    """1, 64; or 1 to 64; or any."""
    built = artefact.built
    if artefact.batch is not None:
        return str(artefact.batch)
    if built and built.batch_sizes:
        return ", ".join(map(str, built.batch_sizes))
    return f"{built.profile[0]} to {built.profile[2]}" if built and built.profile else "any"


def triton_section(artefacts: Sequence[Artefact]) -> str:
    """What is in the repository, and what is not."""
    served = [artefact for artefact in artefacts if is_served(artefact)]
    rows = [
        {
            "model": f"`{model_name(each)}`",
            "platform": BACKENDS[each.suffix].platform,
            "largest batch that the server makes": largest_batch(each) or f"none; the client sends {batches(each)}",
        }
        for each in served
    ]
    notes = {ENGINE_NOTE if each.suffix in ENGINES else NOTES[each.suffix]: None for each in served}
    notes |= {
        PLUGIN_NOTE.format(file=each.path.name, plugin=each.built.plugin): None
        for each in served
        if each.built and each.built.plugin
    }
    if left := [each.path.name for each in artefacts if not is_served(each)]:
        notes[f"Triton has no backend for {', '.join(left)}."] = None
    listed = "\n".join(f"- {note}" for note in notes)
    text = TRITON.format(models=markdown_table(tuple(rows[0]), rows), ensemble=model_name(served[0]) + ENSEMBLE)
    return f"{text}\n{listed}\n"
