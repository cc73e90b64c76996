"""The file of a bundle, and writing it. docs/bundle.md describes it, reader.py reads it; cpp/ has a second reader.

    header, section table | manifest (JSON) | plan (tables) | constants | code for each architecture

All numbers are little-endian.
"""

import dataclasses
import hashlib
import json
import struct

from qswin.qat.bundle.contents import ALIGNMENT, SPACES, Argument, Buffer, Bundle, Cubin

MAGIC = b"\x89QSB\r\n\x1a\n"  # what changes line ends or the eighth bit shows
VERSION = 1
HEADER = struct.Struct("<8sIIQ8x32s")  # magic, version, sections, bytes of the file, checksum of header and table
SECTION = struct.Struct("<IIQQ8x32s")  # kind, architecture, offset, size, checksum
PLAN = struct.Struct("<8I")  # channels, height, width, classes, kernels, batches, launches, arguments
SIGNATURE = struct.Struct("<64s")
BATCH = struct.Struct("<IIQ")  # images, launches, bytes of workspace
LAUNCH = struct.Struct("<4I")  # kernel, grid
ARGUMENT = struct.Struct("<IIQQ")  # kind, 0, value or offset, bytes
CUBIN = struct.Struct("<QQII104s")  # offset in its section, size, bytes of shared memory, threads, function
MANIFEST_KIND, PLAN_KIND, CONSTANTS_KIND, CODE_KIND = 1, 2, 3, 4
INT, FLOAT, NULL = 4, 5, 6  # kinds of arguments after those of SPACES
POINTER_ALIGNMENT = 16  # bytes, which the kernels are compiled for


def aligned(size: int) -> int:
    """A size rounded up to ALIGNMENT."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def write_bundle(bundle: Bundle) -> bytes:
    """The bytes of a bundle's file."""
    manifest = json.dumps(dataclasses.asdict(bundle.manifest), separators=(",", ":")).encode()
    sections = [(MANIFEST_KIND, 0, manifest), (PLAN_KIND, 0, _plan_bytes(bundle))]
    sections.append((CONSTANTS_KIND, 0, bundle.constants))
    sections += [(CODE_KIND, arch, _code_bytes(cubins)) for arch, cubins in sorted(bundle.code.items())]
    return pack_sections(sections)


def pack_sections(sections: list[tuple[int, int, bytes]]) -> bytes:
    """The header, the table and the sections, each (kind, architecture, content), one after the other."""
    end, table, body = HEADER.size + SECTION.size * len(sections), b"", bytearray()
    for kind, arch, content in sections:
        start = aligned(end)
        table += SECTION.pack(kind, arch, start, len(content), hashlib.sha256(content).digest())
        body += bytes(start - end) + content
        end = start + len(content)
    head = HEADER.pack(MAGIC, VERSION, len(sections), end, bytes(32))[:32]
    return head + hashlib.sha256(head + table).digest() + table + body


def _plan_bytes(bundle: Bundle) -> bytes:
    launches = [launch for batch in bundle.batches for launch in batch.launches]
    arguments = [argument for launch in launches for argument in launch.arguments]
    counts = (len(bundle.signatures), len(bundle.batches), len(launches), len(arguments))
    records = [PLAN.pack(*bundle.image, bundle.classes, *counts)]
    records += [SIGNATURE.pack(signature.encode()) for signature in bundle.signatures]
    records += [BATCH.pack(batch.size, len(batch.launches), batch.workspace) for batch in bundle.batches]
    records += [LAUNCH.pack(launch.kernel, *launch.grid) for launch in launches]
    records += [_argument_bytes(argument) for argument in arguments]
    return b"".join(records)


def _argument_bytes(argument: Argument) -> bytes:
    match argument:
        case Buffer(space, offset, size):
            return ARGUMENT.pack(SPACES.index(space), 0, offset, size)
        case float():
            return ARGUMENT.pack(FLOAT, 0, struct.unpack("<I", struct.pack("<f", argument))[0], 4)
        case int():
            return ARGUMENT.pack(INT, 0, argument & 0xFFFFFFFF, 4)
        case _:
            return ARGUMENT.pack(NULL, 0, 0, 8)


def _code_bytes(cubins: tuple[Cubin, ...]) -> bytes:
    """The records of an architecture's cubins, then the cubins; one that stands twice is stored once."""
    offsets: dict[bytes, int] = {}
    records, body = b"", bytearray()
    for cubin in cubins:
        if cubin.code not in offsets:
            body += bytes(-len(body) % ALIGNMENT)
            offsets[cubin.code] = aligned(CUBIN.size * len(cubins)) + len(body)
            body += cubin.code
        place = (offsets[cubin.code], len(cubin.code))
        records += CUBIN.pack(*place, cubin.shared, cubin.threads, cubin.function.encode())
    return records + bytes(-len(records) % ALIGNMENT) + bytes(body)
