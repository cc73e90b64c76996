"""The reader in C++: it takes what the one in Python takes, and no change leads it out of bounds."""

import hashlib
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_thousands_of_changed_bundles_are_refused_or_in_bounds(sanitized, bundle_file):
    """Under AddressSanitizer and UndefinedBehaviorSanitizer, most with right checksums."""
    done = subprocess.run([sanitized / "qswin_fuzz", bundle_file, "3000"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    words = done.stdout.split()
    assert int(words[0]) + int(words[2]) == 3000 and int(words[0]) > 50 and int(words[2]) > 1000


AGREE = """
import random, sys
from pathlib import Path
from qswin.qat.bundle import runner
from qswin.qat.bundle.format import PLAN_KIND, pack_sections
from qswin.qat.bundle.reader import read_bundle
from tests.qat.bundle.test_reader import sections_of

data, random = Path(sys.argv[1]).read_bytes(), random.Random(0)
sections, counts = sections_of(data), {True: 0, False: 0}

def takes(read, data):
    try:
        read(data)
    except ValueError:
        return False
    return True

assert takes(read_bundle, data) and takes(runner.check, data)
for _ in range(200):
    index = random.choice([1, 1, 1, 3])
    kind, arch, content = sections[index]
    changed = bytearray(content)
    at = random.randrange(len(changed) if index == 1 else 128 * 20)
    changed[at] = random.choice([0, 1, 2, 4, 16, 128, 255])
    file = pack_sections([*sections[:index], (kind, arch, bytes(changed)), *sections[index + 1:]])
    ours, theirs = takes(read_bundle, file), takes(runner.check, file)
    assert theirs >= ours, (index, at)  # Python reads the manifest too, which says what the launches are
    counts[theirs] += 1
print(counts[True] > 15, counts[False] > 15)
"""


@pytest.mark.slow
def test_both_readers_agree(cuda_include, bundle_file, plain):
    done = subprocess.run([sys.executable, "-c", AGREE, bundle_file], capture_output=True, text=True, env=plain)
    assert done.returncode == 0 and done.stdout == "True True\n", done.stderr[-2000:]


HASH = """
#include <cstdio>
#include <cstdlib>
#include <vector>
#include "sha256.h"
int main(int, char** arguments) {
  std::vector<uint8_t> data(std::strtoul(arguments[1], nullptr, 10));
  for (size_t i = 0; i < data.size(); ++i) data[i] = uint8_t(7 * i + 3);
  const size_t cut = data.size() / 3;
  for (const uint8_t byte : qswin::sha256({{data.data(), cut}, {data.data() + cut, data.size() - cut}})) std::printf("%02x", byte);
}
"""  # noqa: E501


@pytest.mark.parametrize("options", [[], ["-DQSWIN_PORTABLE"]], ids=["the processor's", "portable"])
def test_checksums_are_sha_256(sanitized, tmp_path, options):
    """Of every length about a block, in two parts."""
    (tmp_path / "hash.cpp").write_text(HASH)
    from tests.cpp.conftest import CPP

    sources = [str(tmp_path / "hash.cpp"), str(CPP / "sha256.cpp")]
    command = ["g++", "-std=c++17", "-O1", "-fsanitize=address,undefined", *options, f"-I{CPP}", *sources]
    subprocess.run([*command, "-o", str(tmp_path / "hash")], check=True)
    for size in (0, 1, 55, 56, 63, 64, 65, 119, 120, 128, 1000):
        found = subprocess.run([tmp_path / "hash", str(size)], capture_output=True, text=True, check=True).stdout
        assert found == hashlib.sha256(bytes((7 * i + 3) % 256 for i in range(size))).hexdigest(), size
