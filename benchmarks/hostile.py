"""Hostile files and settings, each given to the real command under limits of memory and time.

    python -m benchmarks.hostile --out docs/lab/hostile.md [--only WORD] [--jobs 2]

The cases are in hostile_cases.py, hostile_more.py and hostile_files.py. Each has a folder of its own, with a small
model, its graphs and some images. A case is as expected when the command ends in time as it should: refused is one line
and exit code 2, never a traceback.
"""

import argparse
import dataclasses
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks import hostile_files, hostile_more  # noqa: F401  # which add their cases
from benchmarks.hostile_cases import CASES, Case
from benchmarks.hostile_world import World, make_world
from benchmarks.results import commit, machine

LOG = re.compile(r"^[IWEF]\d{4} |^qswin: (?!error:)|^usage: | ")  # a line of the log, or of how a command is used
HEAD = """\
`python -m benchmarks.hostile` gives each to the real command, under limits of memory and time. The rules are in
[SECURITY.md](../../SECURITY.md). *Refused* is one line and exit code 2."""
MEMORY = 4 << 30  # bytes of a process's own


@dataclasses.dataclass(frozen=True)
class Found:
    """How a command ended.

    Args:
        code: its exit code; None when it ran past its time.
        errors: the lines that it wrote to standard error, apart from the log.
        peak: bytes of resident memory at most.
    """

    code: int | None
    seconds: float
    peak: int
    errors: list[str]
    log: str

    @property
    def last(self) -> str:
        return self.errors[-1] if self.errors else ""


def execute(case: Case, command: list[str], folder: Path) -> Found:
    """Runs a command of qswin's in a folder, stopped after the case's time."""
    with (folder / "stderr").open("wb") as errors, (folder / "stdout").open("wb") as output:
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", "qswin", *map(str, command)],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
            start_new_session=True,
            preexec_fn=lambda: _limit(case),
            env={**os.environ, **case.environment},
        )
        code, usage = _wait(process, case, start)
    text = (folder / "stderr").read_text(errors="backslashreplace")
    lines = [line for line in text.replace("\r", "\n").splitlines() if line.strip() and not LOG.match(line)]
    return Found(code, time.perf_counter() - start, usage.ru_maxrss << 10, lines, text)


def _limit(case: Case) -> None:
    """In the child: its memory has a bound, and a Ctrl-C reaches it, also from the background."""
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.umask(case.umask)
    if case.closed:
        os.close(2)


def _wait(process: subprocess.Popen, case: Case, start: float) -> tuple[int | None, resource.struct_rusage]:
    """The exit code, None where it had to be killed, and what it used."""
    interrupted = False
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            process.returncode = os.waitstatus_to_exitcode(status)
            return process.returncode, usage
        past = time.perf_counter() - start
        if case.interrupt is not None and past > case.interrupt and not interrupted:
            os.killpg(process.pid, signal.SIGINT)
            interrupted = True
        if past > case.seconds:
            os.killpg(process.pid, signal.SIGKILL)
            _, _, usage = os.wait4(process.pid, 0)
            return None, usage
        time.sleep(0.05)


def complaint(case: Case, found: Found, world: World) -> str:
    """What is not as expected; empty where all is."""
    if found.code is None:
        return f"still running after {case.seconds} s"
    if found.code != case.code:
        return f"exit code {found.code}"
    if "Traceback" in found.log:
        return "a traceback"
    if case.code and len(found.errors) != (not case.closed):
        return f"{len(found.errors)} lines: {' // '.join(found.errors)[:500]}"
    if case.words and not re.search(case.words, found.log):
        return f"not a word of {case.words!r}"
    if any(not (character.isprintable() or character in "\n\t\r") for character in found.log):
        return "control characters"
    if found.peak > case.megabytes << 20:
        return f"{found.peak >> 20} MB of memory"
    return (case.check(world) or "") if case.check is not None else ""


def row(case: Case, base: Path) -> tuple[str, bool]:
    """A case's line of the table, and whether it is as expected."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(base, folder, dirs_exist_ok=True, symlinks=True)
        world = World(Path(folder))
        command = case.prepare(world)
        found = execute(case, command, world.folder)
        wrong = complaint(case, found, world)
        said = found.last.replace(f"{world.folder}/", "").replace(str(world.folder), ".").replace("|", "\\|")
    expected = "refused" if case.code == 2 else "ends" if case.code == 0 else f"exit code {case.code}"
    figures = f"{found.seconds:.0f} s, {found.peak >> 20} MB"
    cells = (
        str(case.rule),
        case.name.replace("|", "\\|"),
        expected,
        wrong or "as expected",
        figures,
        f"`{said[:300]}`" if said else "",
    )
    return f"| {' | '.join(cells)} |", not wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--jobs", type=int, default=1, help="cases at the same time")
    args = parser.parse_args()
    chosen = sorted((case for case in CASES if args.only in case.name), key=lambda case: case.rule)
    lines, good = [], 0
    with tempfile.TemporaryDirectory() as base, ThreadPoolExecutor(args.jobs) as pool:
        make_world(Path(base))
        for line, as_expected in pool.map(lambda case: row(case, Path(base)), chosen):
            lines.append(line)
            good += as_expected
            print(line, flush=True)
    head = ["# Hostile files and settings", "", HEAD, "", f"{good} of {len(chosen)} are as expected."]
    command = f"`python -m benchmarks.hostile {' '.join(sys.argv[1:])}`"
    head += ["", f"{command} at commit {commit()}, {time.strftime('%Y-%m-%d')}; {machine()}.", ""]
    head += ["| rule | case | expected | found | time, memory | the line |", "| --- | --- | --- | --- | --- | --- |"]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("\n".join([*head, *lines]) + "\n")
    raise SystemExit(good != len(chosen))


if __name__ == "__main__":
    main()
