"""Every command on a disk that fills up, on a read-only one, and as a user who may not write to the folder.

    make demo                                                    (its digits, weights and graphs are what this works on)
    sudo python -m benchmarks.faults --out docs/results/faults.json [--jobs train ...] [--shares 0.6 0]

The disk is a tmpfs with a share left of what the command writes, down to nothing, or one that is mounted read-only. The
user is 65534, in no group and with no home, and the folder is root's; that user must be able to read this Python, the
checkout and the demo. As it should be: exit code 2, one line on standard error apart from the log, no file that its
reader refuses, and every file that the line calls whole is there. Linux, and root to mount.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.demo import ROOT
from benchmarks.hostile import LOG
from benchmarks.kills import commands, make_sensitivity, read_all
from benchmarks.results import commit, device_name, write_rows

NOBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "env", "HOME=/nonexistent"]
SHARES = (0.9, 0.6, 0.3, 0.0)  # of what the command writes
DISK = 64 << 20
PAGE = 4096


@contextmanager
def mounted(free: int, read_only: bool = False) -> Iterator[Path]:
    """A folder in a tmpfs of which so many bytes are free."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", folder], check=True)
        try:
            (Path(folder) / ".filler").write_bytes(bytes(DISK - free))
            (Path(folder) / "run").mkdir()
            if read_only:
                subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
            yield Path(folder) / "run"
        finally:
            subprocess.run(["umount", folder], check=True)


@contextmanager
def roots() -> Iterator[Path]:
    """A folder of root's that others may look into."""
    with tempfile.TemporaryDirectory() as outer:
        Path(outer).chmod(0o755)
        (folder := Path(outer) / "run").mkdir()
        yield folder


def faults(written: int, shares: Sequence[float]) -> Iterator[tuple[str, AbstractContextManager[Path], list[str]]]:
    """What each is, the folder that it makes, and what comes before the command, which writes so many bytes."""
    for share in shares:
        free = int(share * written) // PAGE * PAGE
        yield f"a disk with {free >> 10} kB left, of {written >> 10}", mounted(free), []
    yield "a read-only disk", mounted(DISK, read_only=True), []
    yield "a user without rights", roots(), NOBODY


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


def try_job(job: str, shares: Sequence[float]) -> Iterator[dict[str, Any]]:
    """A row for each fault."""
    with mounted(DISK) as folder:
        command, _ = commands(folder)[job]
        subprocess.run([sys.executable, "-m", *command], cwd=ROOT, check=True, capture_output=True)
        written = sum(path.stat().st_blocks * 512 for path in folder.rglob("*"))
    for fault, made, prefix in faults(written, shares):
        with made as folder:
            problem, line = wrong(commands(folder)[job][0], folder, prefix)
        yield {"job": job, "fault": fault, "wrong": problem, "line": line}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--jobs", nargs="*", default=list(commands(Path())))
    parser.add_argument("--shares", nargs="*", type=float, default=SHARES, help="of what is written, left on the disk")
    args = parser.parse_args()
    make_sensitivity()
    rows: list[dict[str, Any]] = []
    for job in args.jobs:
        for row in try_job(job, args.shares):
            rows.append({**row, "device": device_name("cpu"), "commit": commit()})
            print(row, flush=True)
            write_rows(args.out, rows)
    raise SystemExit(any(row["wrong"] for row in rows))


if __name__ == "__main__":
    main()
