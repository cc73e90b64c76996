"""What a job would do: the answer to --dry-run. Its inputs are read and checked, and nothing is written."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from qswin.calib.data.batches import image_batches
from qswin.calib.data.folders import Sample
from qswin.calib.data.images import Preprocessing
from qswin.calib.data.shards import ImageFile
from qswin.calib.messages import text_of
from qswin.qat.quant.quantizers import quantizers


def plan_text(job: str, facts: Mapping[str, str], outputs: Sequence[Path]) -> str:
    """The plan of a job, a line for each fact and each file that it would write.

    Raises:
        OSError: a file could not be written there.
    """
    lines = [f"qswin {job} would do this; nothing is written now"]
    lines += [f"  {name:<9} {value}" for name, value in facts.items()]
    for path in outputs:
        check_writable(path)
        lines.append(f"  {'writes':<9} {path}{' (over what is there)' if path.exists() else ''}")
    return text_of(lines)


def check_writable(path: Path) -> None:
    """Raises OSError unless the nearest folder above a file that is there can be written to."""
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise OSError(f"{path}: cannot be written, because of {above}; choose another place")


def model_fact(arguments: Mapping[str, Any], model: nn.Module, preprocessing: Preprocessing, weights: object) -> str:
    """Name, classes, size of the images and weights.

    Args:
        arguments: build_model's.
        weights: the file that they come from; None where they are random or downloaded.
    """
    height, width = preprocessing.size
    classes = getattr(model, "num_classes", None)
    heads = f", {classes} classes" if classes else ""
    origin = "random weights" if weights is None else f"weights of {weights}"
    return f"{arguments['name']}{heads}, images of {height} x {width} pixels, {origin}"


def sites_fact(model: nn.Module) -> str:
    """How many quantizers there are, at how many sites."""
    found = list(quantizers(model))
    return f"{len(found)} quantizers at {len({quantizer.recipe_site for quantizer in found})} sites"


def check_readable(
    samples: Sequence[Sample], preprocessing: Preprocessing, batch_size: int, workers: int | None, skip_unreadable: bool
) -> str:
    """Decodes images; says how many there are, and how many would be left out.

    Raises:
        ValueError: one cannot be read, and none may be skipped.
    """
    skipped: list[ImageFile] | None = [] if skip_unreadable else None
    for _ in image_batches(samples, preprocessing, batch_size, workers, skipped):
        pass
    return f"{len(samples)} images" + (f", {len(skipped)} of them unreadable" if skipped else "")
