"""Every command on a disk that fills up, and in a folder that it may not write to.

    make demo                                                    (its digits, weights and graphs are what this works on)
    sudo python -m benchmarks.faults --out docs/results/faults.json [--jobs train ...]

The disk is a tmpfs with a share left of what the command writes, down to nothing. The folder is of mode 0555 and
another user's, and the command lacks root's rights. As it should be: exit code 2, one line on standard error apart from
the log, no file that its reader refuses, and every file that the line calls whole is there. Linux, and root to mount.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.demo import ROOT
from benchmarks.hostile import LOG
from benchmarks.kills import commands, read_all
from benchmarks.results import commit, device_name, write_rows

WITHOUT_RIGHTS = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
SHARES = (0.9, 0.6, 0.3, 0.0)  # of what the command writes
DISK = 64 << 20
PAGE = 4096


@contextmanager
def mounted(free: int) -> Iterator[Path]:
    """A folder in a tmpfs of which so many bytes are free."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", folder], check=True)
        try:
            (Path(folder) / ".filler").write_bytes(bytes(DISK - free))
            (Path(folder) / "run").mkdir()
            yield Path(folder) / "run"
        finally:
            subprocess.run(["umount", folder], check=True)


def wrong(command: list[str], folder: Path, prefix: list[str]) -> tuple[str, str]:
    """What is not as it should be when a command fails, empty if all is; and the line."""
    done = subprocess.run(
        [*prefix, sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, errors="replace"
    )
    lines = [line for line in done.stderr.splitlines() if line.strip() and not LOG.match(line)]
    said = (lines or [""])[-1]
    if done.returncode != 2 or len(lines) != 1:
        return f"exit code {done.returncode}, {len(lines)} lines", said
    read_all(folder)
    whole = re.search("saved before it, and whole: (.*)", said)
    missing = [
        name for name in (whole[1].split(", ") if whole else ()) if not (Path(name).is_file() or name.endswith(" more"))
    ]
    return (f"{missing[0]} is not there" if missing else ""), said.replace(f"{folder}/", "")


def try_job(job: str) -> Iterator[dict[str, Any]]:
    """A row for each fault."""
    with mounted(DISK) as folder:
        command, _ = commands(folder)[job]
        subprocess.run([sys.executable, "-m", *command], cwd=ROOT, check=True, capture_output=True)
        written = sum(path.stat().st_blocks * 512 for path in folder.rglob("*"))
    for share in SHARES:
        free = int(share * written) // PAGE * PAGE
        with mounted(free) as folder:
            problem, line = wrong(commands(folder)[job][0], folder, [])
        yield {
            "job": job,
            "fault": f"a disk with {free >> 10} kB left, of {written >> 10}",
            "wrong": problem,
            "line": line,
        }
    with tempfile.TemporaryDirectory() as outer:
        (folder := Path(outer) / "run").mkdir()
        os.chown(folder, 65534, 65534)
        folder.chmod(0o555)
        problem, line = wrong(commands(folder)[job][0], folder, WITHOUT_RIGHTS)
        yield {"job": job, "fault": "a folder that it may not write to", "wrong": problem, "line": line}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--jobs", nargs="*", default=list(commands(Path())))
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for job in args.jobs:
        for row in try_job(job):
            rows.append({**row, "device": device_name("cpu"), "commit": commit()})
            print(row, flush=True)
            write_rows(args.out, rows)
    raise SystemExit(any(row["wrong"] for row in rows))


if __name__ == "__main__":
    main()
