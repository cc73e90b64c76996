"""A bundle's file is read as it was written, or refused in one line: whatever is changed, nothing is out of bounds."""

import dataclasses
import hashlib
import json
import struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qswin.qat.bundle import format as file_format
from qswin.qat.bundle.contents import Buffer, space_sizes
from qswin.qat.bundle.format import CODE_KIND, HEADER, MAGIC, SECTION, pack_sections, write_bundle
from qswin.qat.bundle.reader import read_bundle

FUZZ = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="session")
def data(made):
    return write_bundle(made.bundle)


def sections_of(data):
    """(kind, architecture, content) of each section."""
    count = HEADER.unpack_from(data)[2]
    table = SECTION.iter_unpack(data[HEADER.size : HEADER.size + SECTION.size * count])
    return [(kind, arch, data[start : start + size]) for kind, arch, start, size, _ in table]


def test_what_is_written_is_read(made, data):
    read = read_bundle(data)
    assert read == made.bundle
    assert write_bundle(read) == data


def test_the_file_is_laid_out_as_documented(data):
    magic, version, count, size, digest = HEADER.unpack_from(data)
    assert (magic, version, count, size) == (MAGIC, 1, 5, len(data)) and HEADER.size == SECTION.size == 64
    table = data[64 : 64 * (1 + count)]
    assert hashlib.sha256(data[:32] + table).digest() == digest
    for (kind, arch, content), entry in zip(sections_of(data), SECTION.iter_unpack(table), strict=True):
        assert entry[2] % 256 == 0 and hashlib.sha256(content).digest() == entry[4]
        assert (kind == CODE_KIND) == (arch in (80, 90))
    assert json.loads(sections_of(data)[0][2])["model"]["engine_precision"] == "int8"


def refused(data):
    """The one line with which it is refused."""
    with pytest.raises(ValueError) as error:
        read_bundle(data, "x.qsb")
    line = str(error.value)
    assert line.startswith("x.qsb: ") and "\n" not in line
    return line


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: b"", "not a bundle"),
        (lambda data: b"PK" + data[2:], "not a bundle"),
        (lambda data: data[:63], "not a bundle"),
        (lambda data: data[:-1], "cut off, or changed"),
        (lambda data: data + b"\0", "cut off, or changed"),
        (lambda data: data[:8] + b"\2" + data[9:], "of format 2, and this qswin reads format 1"),
        (lambda data: data[:70] + b"\7" + data[71:], "header was changed"),
        (lambda data: data[:-1] + bytes([data[-1] ^ 1]), "checksum does not hold"),
    ],
    ids=["empty", "foreign", "header cut", "cut", "longer", "newer", "table", "code"],
)
def test_a_file_that_is_not_whole_is_refused(data, change, message):
    assert message in refused(change(data))


@FUZZ
@given(st.data())
def test_changed_bytes_change_nothing_or_are_refused(data, draw):
    changed = bytearray(data)
    for _ in range(draw.draw(st.integers(1, 4))):
        changed[draw.draw(st.integers(0, len(data) - 1))] = draw.draw(st.integers(0, 255))
    cut = draw.draw(st.sampled_from([0, 0, 0, 1, 64, 1000]))
    try:
        read = read_bundle(bytes(changed[: len(changed) - cut]))
    except ValueError as error:
        assert "\n" not in str(error)
    else:
        assert write_bundle(read) == data  # only bytes between sections were changed


def changed_content(draw, content):
    """A section of which a few bytes, or numbers of four or eight bytes, are others, or that is longer or shorter."""
    content = bytearray(content)
    for _ in range(draw.draw(st.integers(1, 3))):
        value = draw.draw(st.sampled_from([b"\0", b"\xff", b"\1", b"\x7f"]) | st.binary(min_size=1, max_size=8))
        value = (value * draw.draw(st.sampled_from([1, 4, 8])))[:8]
        at = draw.draw(st.integers(0, len(content)))
        at -= draw.draw(st.sampled_from([0, at % 8]))
        content[at : at + len(value)] = value
    return bytes(content[: draw.draw(st.sampled_from([None, None, None, -1, len(content) // 2]))])


@FUZZ
@given(st.data())
def test_changed_sections_with_right_checksums_are_never_out_of_bounds(data, draw):
    """Someone who changes a file can make its checksums right too."""
    sections = sections_of(data)
    index = draw.draw(st.sampled_from([0, 1, 1, 1, 1, 2, 3, 4]))
    kind, arch, content = sections[index]
    sections[index] = (kind, arch, changed_content(draw, content))
    try:
        read = read_bundle(pack_sections(sections))
    except ValueError as error:
        assert "\n" not in str(error)
    else:
        assert_in_bounds(read)


def assert_in_bounds(bundle):
    for batch in bundle.batches:
        sizes = space_sizes(bundle, batch)
        for launch in batch.launches:
            assert len(launch.arguments) == len(bundle.signatures[launch.kernel])
            for argument in launch.arguments:
                if isinstance(argument, Buffer):
                    assert 0 <= argument.offset < argument.offset + argument.size <= sizes[argument.space]
    for cubins in bundle.code.values():
        assert len(cubins) == len(bundle.signatures)


def with_plan(data, change):
    """A file whose plan `change` has changed in place, with right checksums."""
    sections = sections_of(data)
    plan = bytearray(sections[1][2])
    change(plan)
    sections[1] = (sections[1][0], 0, bytes(plan))
    return pack_sections(sections)


def first(record, plan):
    """Where the first record of a kind lies in a plan."""
    *_, kernels, batches, launches, _ = file_format.PLAN.unpack_from(plan)
    starts, at = {}, file_format.PLAN.size
    for each, count in (("SIGNATURE", kernels), ("BATCH", batches), ("LAUNCH", launches), ("ARGUMENT", 0)):
        starts[each] = at
        at += getattr(file_format, each).size * count
    return starts[record]


@pytest.mark.parametrize(
    ("record", "at", "value", "message"),
    [
        ("ARGUMENT", 8, 1 << 40, "a buffer lies outside of its input"),
        ("ARGUMENT", 8, 8, "a buffer lies outside of its input"),
        ("ARGUMENT", 16, 0, "a buffer lies outside of its input"),
        ("ARGUMENT", 0, 4, "an argument that is not what its kernel takes"),
        ("ARGUMENT", 0, 1 | 1 << 32, "an argument that is not what its kernel takes"),
        ("LAUNCH", 0, 999 | 1 << 32, "a launch of a kernel that it lacks"),
        ("LAUNCH", 8, 0, "a grid that CUDA does not take"),
        ("LAUNCH", 8, 1 << 16, "a grid that CUDA does not take"),
        ("BATCH", 0, 2 | 1 << 32, "launches that no batch has"),
        ("BATCH", 0, 9 | 34 << 32, "batches [9, 4]"),
        ("BATCH", 8, 1 << 50, "a workspace that is too large"),
        ("BATCH", 8, 256, "a buffer lies outside of its workspace"),
        ("SIGNATURE", 0, 0, "a name that is not one"),
        ("SIGNATURE", 0, 0x7070707071707070, "a name that is not one"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(data, record, at, value, message):
    def change(plan):
        struct.pack_into("<Q", plan, first(record, plan) + at, value)

    assert message in refused(with_plan(data, change))


def test_addresses_that_are_not_aligned_are_refused(data):
    """Kernels are compiled for multiples of 16."""

    def change(plan):
        offset = first("ARGUMENT", plan)
        struct.pack_into("<QQ", plan, offset + 8, 8, 64)

    assert "not aligned" in refused(with_plan(data, change))


@pytest.mark.parametrize("at", range(0, 32, 4))
def test_counts_that_are_too_large_are_refused(data, at):
    assert "asks for more than a bundle may" in refused(
        with_plan(data, lambda plan: struct.pack_into("<I", plan, at, 0xFFFFFFFF))
    )


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ([1, 0, 2, 3, 4], "do not belong together"),
        ([0, 1, 2, 4, 3], "do not belong together"),
        ([0, 1, 2, 3, 3], "do not belong together"),
        ([0, 1, 2], "3 sections"),
    ],
)
def test_sections_come_in_order(data, order, message):
    sections = sections_of(data)
    assert message in refused(pack_sections([sections[index] for index in order]))


def test_a_manifest_of_another_bundle_is_refused(made, data):
    manifest = made.bundle.manifest
    for changed, message in (
        (dataclasses.replace(manifest, kernels=manifest.kernels[1:]), "describes other kernels"),
        (dataclasses.replace(manifest, calls=manifest.calls[::-1]), "describes another launch of qswin::"),
        (dataclasses.replace(manifest, calls=[manifest.calls[0][1:], manifest.calls[1]]), "describes other launches"),
    ):
        assert message in refused(write_bundle(made.bundle._replace(manifest=changed)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values | {"other": 1}, "manifest: unknown key 'other'"),
        (lambda values: values | {"kernels": 7}, "manifest: kernels is 7: expected array"),
        (lambda values: [], "manifest: the whole"),
    ],
)
def test_a_manifest_that_is_not_one_is_refused(data, change, message):
    sections = sections_of(data)
    values = change(json.loads(sections[0][2]))
    assert message in refused(pack_sections([(1, 0, json.dumps(values).encode()), *sections[1:]]))


def test_code_that_is_no_cubin_is_refused(made):
    for changed in ({"code": b"\x7fELF\x01" + bytes(90)}, {"function": ""}, {"threads": 33}, {"shared": 1 << 20}):
        cubins = (made.bundle.code[80][0]._replace(**changed), *made.bundle.code[80][1:])
        refused(write_bundle(made.bundle._replace(code={80: cubins})))


def test_cubins_that_overlap_are_refused(data):
    """A small file could ask for a large part of itself thousands of times."""
    *others, (kind, arch, content) = sections_of(data)
    records = b"".join(
        file_format.CUBIN.pack(1024 * 3, len(content) - 1024 * 3 - index, *record[2:])
        for index, record in enumerate(file_format.CUBIN.iter_unpack(content[: 128 * 23]))
    )
    assert "cubins in each other" in refused(pack_sections([*others, (kind, arch, records + content[len(records) :])]))
