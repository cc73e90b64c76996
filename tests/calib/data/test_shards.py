"""WebDataset shards: read as the webdataset library reads what it wrote, and refused when they are broken."""

import io
import os
import tarfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qswin.calib.data.batches import image_batches
from qswin.calib.data.folders import scan_folder
from qswin.calib.data.images import Preprocessing
from qswin.calib.data.shards import scan_shard
from tests.helpers import write_shards

webdataset = pytest.importorskip("webdataset", reason="webdataset is not installed")
PREPROCESSING = Preprocessing(size=(16, 16), crop_pct=1.0)


def tar_bytes(members):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def write_tar(path, members):
    path.write_bytes(tar_bytes(members))
    return path


def test_shards_are_the_folder_they_were_made_of(data, tmp_path):
    folder = scan_folder("classification", data / "val")
    root = write_shards(folder, tmp_path / "shards")
    (root / "classes.txt").write_text("\n".join(folder.classes))
    shards = scan_folder("classification", root, folder.classes)
    assert shards.classes == folder.classes and len(list(root.glob("*.tar"))) == 4
    for ours, theirs in zip(
        image_batches(shards.samples, PREPROCESSING, 8), image_batches(folder.samples, PREPROCESSING, 8, 0), strict=True
    ):
        np.testing.assert_array_equal(ours.images, theirs.images)
        np.testing.assert_array_equal(ours.labels, theirs.labels)


def test_the_library_reads_the_same_samples(data, tmp_path):
    root = write_shards(scan_folder("classification", data / "val"), tmp_path / "shards")
    files = [str(path) for path in sorted(root.glob("*.tar"))]
    theirs = list(webdataset.WebDataset(files, shardshuffle=False, empty_check=False))
    ours = scan_folder("classification", root).samples
    assert len(ours) == len(theirs) == 20
    for (image, label), sample in zip(ours, theirs, strict=True):
        assert image.open().read() == sample["png"] and label == int(sample["cls"]) and image.stem == sample["__key__"]


def test_classes_without_names_are_numbers(data, tmp_path):
    root = write_shards(scan_folder("classification", data / "val"), tmp_path / "shards")
    assert scan_folder("classification", root).classes == ("0", "1", "2", "3", "4")
    assert scan_folder("classification", root, list("abcdef")).classes == tuple("abcdef")  # a model knows their names
    with pytest.raises(ValueError, match="a label is 4, but there are 3 classes"):
        scan_folder("classification", root, list("abc"))
    (root.parent / "classes.txt").write_text("a\nb\nc\nd\ne\n")
    with pytest.raises(ValueError, match="class 0 is 'a' here but 'x' in the model"):
        scan_folder("classification", root, list("xbcde"))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.jpg", b"x")], "a lacks its .cls or its image"),
        ([("a.cls", b"1")], "a lacks its .cls or its image"),
        ([("a.jpg", b"x"), ("a.cls", b"cat")], "a.cls is not a class index"),
        ([("a.jpg", b"x"), ("a.cls", b"1" * 21)], "a.cls is not a class index"),
        ([("a.jpg", b"x"), ("a.cls", b"999999999")], "a.cls is not a class index"),
        ([("a.jpg", b"x"), ("a.png", b"x"), ("a.cls", b"1")], "a occurs twice"),
    ],
)
def test_malformed_shards_are_refused(tmp_path, members, message):
    with pytest.raises(ValueError, match=message):
        scan_shard(write_tar(tmp_path / "x.tar", members))


def test_an_image_is_not_larger_than_memory(tmp_path):
    """A file of 1 TB that takes no space."""
    data = tar_bytes([("a.cls", b"0")])[:1024]
    (info := tarfile.TarInfo("a.png")).size = 1 << 40
    with (file := tmp_path / "x.tar").open("wb") as opened:
        opened.write(data + info.tobuf())
        opened.truncate(len(data) + 512 + (1 << 40))
    with pytest.raises(ValueError, match=r"x\.tar: a\.png is larger than 256 MiB; take it out"):
        scan_shard(file)


def test_nothing_leaves_a_shard(tmp_path):
    """Names that point elsewhere are names and no more; links and devices are no images."""
    shard = write_tar(tmp_path / "x.tar", [("../../evil.jpg", b"x"), ("../../evil.cls", b"0")])
    link = tarfile.TarInfo("secret.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    with tarfile.open(shard, "a") as tar:
        tar.addfile(link)
    ((image, label),) = scan_shard(shard)
    assert image.open().read() == b"x" and label == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.tar"]


def test_compressed_and_truncated_shards_say_so(tmp_path):
    shard = write_tar(tmp_path / "x.tar", [("a.jpg", b"x" * 5000), ("a.cls", b"0")])
    whole = shard.read_bytes()
    shard.write_bytes(whole[:2000])
    with pytest.raises(ValueError, match="truncated"):
        scan_shard(shard)
    with tarfile.open(shard, "w:gz"):
        pass
    with pytest.raises(ValueError, match="compressed.*plain .tar"):
        scan_shard(shard)


WHOLE = tar_bytes([("a.jpg", b"x" * 700), ("a.cls", b"3")])


@settings(max_examples=200)
@given(
    changes=st.lists(st.tuples(st.integers(0, 2047), st.integers(0, 255)), min_size=1, max_size=6),
    cut=st.integers(0, 10240),
)
def test_broken_bytes_give_samples_or_one_error(tmp_path_factory, changes, cut):
    content = bytearray(WHOLE)
    for place, value in changes:
        content[place] = value
    shard = tmp_path_factory.mktemp("shards") / "x.tar"
    shard.write_bytes(content[: len(content) - cut])
    try:
        samples = scan_shard(shard)
    except ValueError as error:
        assert str(shard) in str(error)
    else:
        assert all(len(image.open().read()) == image.size for image, _ in samples)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_only_regular_files_are_shards(tmp_path, make):
    make(tmp_path / "a.tar")
    with pytest.raises(ValueError, match=r"a\.tar: not a tar file, compressed or truncated \(.*not a regular file"):
        scan_folder("classification", tmp_path)
