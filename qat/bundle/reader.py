"""Reading a bundle's file, with every offset, size and count checked before it is used.

What a file asks for is bounded. cpp/bundle.cpp has the same checks.
"""

import hashlib
import struct
from collections.abc import Iterator
from typing import Any, NoReturn

from qswin.calib.reading import parse_json
from qswin.calib.validation import validate
from qswin.qat.bundle.contents import (
    ARCHITECTURES,
    SPACES,
    Argument,
    Batch,
    Buffer,
    Bundle,
    Cubin,
    Launch,
    Manifest,
    TensorAt,
    buffer_of,
    space_sizes,
)
from qswin.qat.bundle.format import (
    ARGUMENT,
    BATCH,
    CODE_KIND,
    CONSTANTS_KIND,
    CUBIN,
    FLOAT,
    HEADER,
    INT,
    LAUNCH,
    MAGIC,
    MANIFEST_KIND,
    NULL,
    PLAN,
    PLAN_KIND,
    POINTER_ALIGNMENT,
    SECTION,
    SIGNATURE,
    VERSION,
    aligned,
)

MOST_SECTIONS, MOST_KERNELS, MOST_BATCHES, MOST_LAUNCHES, MOST_ARGUMENTS = 3 + 16, 4096, 64, 1 << 16, 1 << 20
LARGEST_SIDE, LARGEST_CLASSES, LARGEST_BATCH = 1 << 16, 1 << 20, 1 << 16
LARGEST_BUFFER, LARGEST_MANIFEST = 1 << 44, 64 << 20
LARGEST_GRID = ((1 << 31) - 1, (1 << 16) - 1, (1 << 16) - 1)  # of CUDA
LARGEST_SHARED, LARGEST_PROGRAM = 227 << 10, 1024  # bytes of shared memory, threads; of any GPU that is known
ELF = b"\x7fELF\x02\x01"  # 64 bits, little-endian


class _Reader:
    """Reads a file whose messages begin with `where`."""

    def __init__(self, data: bytes, where: str) -> None:
        self.data, self.where = memoryview(data), where

    def refuse(self, what: str) -> NoReturn:
        raise ValueError(f"{self.where}: {what}; build it again with qswin build --target bundle")

    def check(self, holds: bool, what: str) -> None:
        if not holds:
            self.refuse(what)

    def sections(self) -> list[tuple[int, int, memoryview]]:
        """(kind, architecture, content) of each section, their checksums being right."""
        data = self.data
        self.check(len(data) >= HEADER.size and bytes(data[:8]) == MAGIC, "not a bundle")
        _, version, count, size, digest = HEADER.unpack_from(data)
        self.check(version == VERSION, f"of format {version}, and this qswin reads format {VERSION}")
        self.check(size == len(data), f"it has {len(data)} bytes of {size}: cut off, or changed")
        self.check(4 <= count <= MOST_SECTIONS, f"{count} sections")
        end = HEADER.size + SECTION.size * count
        self.check(end <= len(data), "cut off")
        table = data[HEADER.size : end]
        self.check(hashlib.sha256(bytes(data[:32]) + table).digest() == digest, "its header was changed")
        return [self._section(*each) for each in self._placed(SECTION.iter_unpack(table), end)]

    def _placed(self, sections: Iterator[tuple[Any, ...]], end: int) -> Iterator[tuple[Any, ...]]:
        """The entries of the table, each of which begins where the one before it ends, up to the file's end."""
        for kind, arch, offset, size, digest in sections:
            self.check(offset == aligned(end) and size <= len(self.data) - offset, "a section lies outside of the file")
            end = offset + size
            yield kind, arch, offset, size, digest
        self.check(end == len(self.data), "bytes that belong to no section")

    def _section(self, kind: int, arch: int, offset: int, size: int, digest: bytes) -> tuple[int, int, memoryview]:
        content = self.data[offset : offset + size]
        self.check(hashlib.sha256(content).digest() == digest, "changed since it was built: a checksum does not hold")
        return kind, arch, content

    def plan(self, data: memoryview) -> tuple[tuple[int, int, int], int, tuple[str, ...], list[Batch]]:
        """The image's shape, the number of classes, the kernels' signatures, and the batches."""
        self.check(len(data) >= PLAN.size, "its plan is cut off")
        *image, classes, kernels, batches, launches, arguments = PLAN.unpack_from(data)
        counts = ((kernels, MOST_KERNELS), (batches, MOST_BATCHES), (launches, MOST_LAUNCHES))
        sizes = (*((side, LARGEST_SIDE) for side in image), (classes, LARGEST_CLASSES))
        in_range = all(1 <= value <= most for value, most in (*counts, *sizes)) and arguments <= MOST_ARGUMENTS
        self.check(in_range, "its plan asks for more than a bundle may")
        records = ((SIGNATURE, kernels), (BATCH, batches), (LAUNCH, launches), (ARGUMENT, arguments))
        tables = self.tables(data[PLAN.size :], records)
        signatures = tuple(self.text(each, "pif") for (each,) in tables[0])
        self.check(all(signatures), "a kernel without arguments")
        placed = [
            Batch(size, workspace, tuple(self.launches(count, signatures, tables[2], tables[3])))
            for size, count, workspace in tables[1]
        ]
        self.check(next(tables[2], None) is None and next(tables[3], None) is None, "launches that no batch has")
        return (image[0], image[1], image[2]), classes, signatures, placed

    def tables(self, data: memoryview, records: tuple[tuple[struct.Struct, int], ...]) -> list[Iterator[Any]]:
        """The records of each table, of which there are (kind of record, how many), one table after the other."""
        whole = sum(record.size * count for record, count in records)
        self.check(len(data) == whole, "its plan is not of the size that it says")
        tables = []
        for record, count in records:
            tables.append(record.iter_unpack(data[: record.size * count]))
            data = data[record.size * count :]
        return tables

    def launches(
        self, count: int, signatures: tuple[str, ...], launches: Iterator[Any], arguments: Iterator[Any]
    ) -> Iterator[Launch]:
        """The next `count` launches with their arguments."""
        self.check(count >= 1, "a batch without launches")
        for _ in range(count):
            record = next(launches, None)
            if record is None:
                self.refuse("a batch has more launches than there are")
            kernel, *grid = record
            self.check(kernel < len(signatures), "a launch of a kernel that it lacks")
            in_range = all(1 <= side <= most for side, most in zip(grid, LARGEST_GRID, strict=True))
            self.check(in_range, "a grid that CUDA does not take")
            found = tuple(self.argument(kind, next(arguments, None)) for kind in signatures[kernel])
            yield Launch(kernel, (grid[0], grid[1], grid[2]), found)

    def argument(self, letter: str, record: Any) -> Argument:
        if record is None:
            self.refuse("a launch without its arguments")
        kind, reserved, value, size = record
        letters = {INT: "i", FLOAT: "f", NULL: "p", **dict.fromkeys(range(len(SPACES)), "p")}
        self.check(letters.get(kind) == letter and not reserved, "an argument that is not what its kernel takes")
        if kind < len(SPACES):
            return Buffer(SPACES[kind], value, size)  # type: ignore[arg-type]  # one of them
        self.check(value <= (0 if kind == NULL else 0xFFFFFFFF) and size == (8 if kind == NULL else 4), "an argument")
        if kind == NULL:
            return None
        packed = struct.pack("<I", value)
        return struct.unpack("<i" if kind == INT else "<f", packed)[0]

    def text(self, field: bytes, letters: str = "") -> str:
        """Printable ASCII, of `letters` where they are given, filled up with zeros behind."""
        text = field.rstrip(b"\0")
        known = all(33 <= byte < 127 and (not letters or chr(byte) in letters) for byte in text)
        self.check(known and len(text) < len(field), "a name that is not one")
        return text.decode("ascii")

    def code(self, data: memoryview, kernels: int) -> tuple[Cubin, ...]:
        self.check(len(data) >= CUBIN.size * kernels, "its code is cut off")
        records = list(CUBIN.iter_unpack(data[: CUBIN.size * kernels]))
        self.check(sum(size for _, size in {record[:2] for record in records}) <= len(data), "cubins in each other")
        return tuple(self.cubin(data, CUBIN.size * kernels, *record) for record in records)

    def cubin(
        self, data: memoryview, start: int, offset: int, size: int, shared: int, threads: int, name: bytes
    ) -> Cubin:
        inside = start <= offset <= len(data) and 64 <= size <= len(data) - offset
        self.check(inside, "a cubin lies outside of its section")
        program = shared <= LARGEST_SHARED and 32 <= threads <= LARGEST_PROGRAM and not threads % 32
        self.check(program, "a kernel that no GPU can run")
        code = bytes(data[offset : offset + size])
        table, entry, entries = *struct.unpack_from("<Q", code, 40), *struct.unpack_from("<HH", code, 58)
        self.check(code[:6] == ELF and table + entry * entries <= size, "a cubin that is not one")
        function = self.text(name)
        self.check(bool(function), "a cubin without a function")
        return Cubin(code, function, shared, threads)

    def check_batches(self, bundle: Bundle) -> None:
        """Checks that sizes ascend, and that every buffer lies in its space, at an address that kernels read from."""
        sizes = [batch.size for batch in bundle.batches]
        self.check(sizes == sorted(set(sizes)) and 1 <= sizes[0] and sizes[-1] <= LARGEST_BATCH, f"batches {sizes}")
        for batch in bundle.batches:
            self.check(batch.workspace <= LARGEST_BUFFER, "a workspace that is too large")
            spaces = space_sizes(bundle, batch)
            self.check(spaces["input"] <= LARGEST_BUFFER, "images that are too large")
            for buffer in (each for launch in batch.launches for each in launch.arguments if isinstance(each, Buffer)):
                inside = buffer.size >= 1 and buffer.offset + buffer.size <= spaces[buffer.space]
                self.check(inside, f"a buffer lies outside of its {buffer.space}")
                self.check(buffer.offset % POINTER_ALIGNMENT == 0, "a buffer that is not aligned")

    def check_manifest(self, bundle: Bundle) -> None:
        """Checks that it describes the launches that there are, each call's tensors being its launch's buffers."""
        kernels, calls = bundle.manifest.kernels, bundle.manifest.calls
        self.check(len(kernels) == len(bundle.signatures), "its manifest describes other kernels")
        shape = [len(batch.launches) for batch in bundle.batches]
        self.check([len(each) for each in calls] == shape, "its manifest describes other launches")
        for batch, described in zip(bundle.batches, calls, strict=True):
            for launch, call in zip(batch.launches, described, strict=True):
                tensors = [each for each in (*call.arguments, call.result) if isinstance(each, TensorAt)]
                matches = {buffer_of(tensor) for tensor in tensors} <= set(launch.arguments)
                self.check(matches, f"its manifest describes another launch of {call.operator}")


def read_bundle(data: bytes, where: str = "the bundle") -> Bundle:
    """What a bundle's file holds.

    Args:
        where: what messages begin with: the file's path.

    Raises:
        ValueError: it is no bundle, of another version, cut off or changed, or one of its offsets, sizes or counts does
            not fit the others or is larger than any bundle's.
    """
    reader = _Reader(data, where)
    sections = reader.sections()
    kinds = [kind for kind, _, _ in sections]
    code = {arch: content for kind, arch, content in sections if kind == CODE_KIND}
    order = [MANIFEST_KIND, PLAN_KIND, CONSTANTS_KIND, *[CODE_KIND] * len(code)]
    known = kinds == order and list(code) == sorted(code) and set(code) <= set(ARCHITECTURES)
    reader.check(known and not any(arch for _, arch, _ in sections[:3]), "sections that do not belong together")
    image, classes, signatures, batches = reader.plan(sections[1][2])
    reader.check(len(sections[0][2]) <= LARGEST_MANIFEST, "its manifest is too large")
    values = parse_json(bytes(sections[0][2]), f"{where}: its manifest")
    manifest = validate(values, Manifest, f"{where}: its manifest")
    cubins = {arch: reader.code(content, len(signatures)) for arch, content in code.items()}
    bundle = Bundle(manifest, image, classes, signatures, tuple(batches), bytes(sections[2][2]), cubins)
    reader.check_batches(bundle)
    reader.check_manifest(bundle)
    return bundle
