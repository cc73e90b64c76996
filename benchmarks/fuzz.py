"""Coverage-guided fuzzing of what reads files from elsewhere: calibration caches and configs.

    pip install atheris
    python -m benchmarks.fuzz cache|config|override -max_total_time=300 [CORPUS_FOLDER]     (libFuzzer's options)

A file is read, or it is refused by a ValueError: anything else that is raised is a finding, and ends the run.
"""

import contextlib
import math
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["qswin.calib.trt_cache.cache_file", "qswin.qat.config", "yaml", "omegaconf"]):
    from qswin.calib.trt_cache.cache_file import format_cache, parse_cache
    from qswin.qat.config import load_config

CONFIG = "model: {name: swin_tiny_patch4_window7_224}\ndata: {root: x}\nrun: y\n"


def cache(data: bytes) -> None:
    """What is read can be written, and reads the same."""
    try:
        _, _, ranges = parse_cache(data)
    except ValueError:
        return
    kept = {name: amax for name, amax in ranges.items() if 0 < amax < math.inf and "\r" not in name}
    again = parse_cache(format_cache(kept, "8.6.0", "entropy2"))[2]
    assert again == kept, (kept, again)


def config(data: bytes) -> None:
    with tempfile.NamedTemporaryFile(suffix=".yaml") as file, contextlib.suppress(ValueError):
        Path(file.name).write_bytes(data)
        load_config(file.name, [])


def override(data: bytes) -> None:
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file, contextlib.suppress(ValueError):
        file.write(CONFIG)
        file.flush()
        load_config(file.name, [atheris.FuzzedDataProvider(data).ConsumeUnicodeNoSurrogates(200)])


TARGETS = {"cache": cache, "config": config, "override": override}


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        raise SystemExit(f"{__doc__}\ngive one of {', '.join(TARGETS)}")
    atheris.Setup([sys.argv[0], *sys.argv[2:]], TARGETS[sys.argv[1]])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
