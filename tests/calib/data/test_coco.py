"""Annotations in COCO's format: what pycocotools reads too, and files that are refused."""

import json

import pytest
from PIL import Image

from qswin.calib.data.coco import ANNOTATIONS, read_coco
from qswin.calib.data.folders import scan_folder


@pytest.fixture
def content(tmp_path) -> dict:
    """Two images of 40 x 30 pixels, and an object in one."""
    for name in ("a.png", "b.png", "other.png"):
        Image.new("RGB", (40, 30)).save(tmp_path / name)
    return {
        "info": {"year": 2026},
        "images": [
            {"id": index, "file_name": name, "width": 40, "height": 30} for index, name in ((7, "a.png"), (9, "b.png"))
        ],
        "annotations": [
            {"id": 1, "image_id": 9, "category_id": 3, "bbox": [2, 3.5, 10, 20], "area": 200, "iscrowd": 0},
        ],
        "categories": [{"id": 3, "name": "cat", "supercategory": "animal"}],
    }


def write(folder, content):
    (folder / ANNOTATIONS).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder / ANNOTATIONS


def test_it_is_what_pycocotools_reads(tmp_path, content, capsys):
    coco = read_coco(write(tmp_path, content))
    theirs = pytest.importorskip("pycocotools.coco").COCO(str(tmp_path / ANNOTATIONS))
    assert {image: [each.bbox for each in found] for image, found in coco.objects().items()} == {
        image: [tuple(each["bbox"]) for each in theirs.imgToAnns[image]] for image in theirs.getImgIds()
    }
    assert [picture.file_name for picture in coco.images] == ["a.png", "b.png"]


def test_a_folder_has_the_images_that_are_named_or_all(tmp_path, content):
    assert [path.name for path, _ in scan_folder("features", tmp_path).samples] == ["a.png", "b.png", "other.png"]
    write(tmp_path, content)
    folder = scan_folder("features", tmp_path)
    assert ([path.name for path, _ in folder.samples], folder.classes) == (["a.png", "b.png"], ())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: c["images"].append({"id": 8, "file_name": "c.png", "width": 1, "height": 1}),
            "image 8: there is no .*c.png",
        ),
        (lambda c: c["images"][0].update(file_name="../a.png"), "image 7: '../a.png' is not below"),
        (lambda c: c["images"][0].update(file_name="/etc/passwd"), "is not below"),
        (lambda c: c["images"][0].update(id=9), "two images have the same id"),
        (lambda c: c["images"][0].update(width=0), "not annotations in COCO's format.*width"),
        (
            lambda c: c["annotations"][0].update(bbox=[35, 3, 10, 20]),
            "annotation 1: its box .* is not inside its image of 40 x 30",
        ),
        (lambda c: c["annotations"][0].update(bbox=[-3, 3, 10, 20]), "is not inside its image"),
        (lambda c: c["annotations"][0].update(bbox=[3, 3, 0, 20]), "is empty; width and height must be above 0"),
        (lambda c: c["annotations"][0].update(bbox=[3, 3, 5]), "not annotations in COCO's format"),
        (lambda c: c["annotations"][0].update(image_id=1), "image_id 1 is not among the images"),
        (lambda c: c["annotations"][0].update(category_id=1), "category_id 1 is not among the categories"),
        (lambda c: c.pop("images"), "not annotations in COCO's format"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, content, change, message):
    change(content)
    with pytest.raises(ValueError, match=message) as error:
        read_coco(write(tmp_path, content))
    assert "\n" not in str(error.value)


def test_other_files_are_refused(tmp_path):
    for text in ("", "[1]", "{" * 10**5, "\udcff"):
        (tmp_path / ANNOTATIONS).write_bytes(text.encode(errors="surrogateescape"))
        with pytest.raises(ValueError, match="not annotations in COCO's format"):
            read_coco(tmp_path / ANNOTATIONS)
    with pytest.raises(FileNotFoundError):
        read_coco(tmp_path / "none.json")
