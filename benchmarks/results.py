"""Rows of docs/results: what every benchmark adds to them."""

import json
import os
import platform
import subprocess
from pathlib import Path

import torch


def device_name(device: str) -> str:
    """The GPU's name, or the CPU's with the number of threads."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{name}, {torch.get_num_threads()} threads"


def machine() -> str:
    """The CPU, its cores, the memory and the GPU, in words."""
    (total,) = (line.split()[1] for line in Path("/proc/meminfo").read_text().splitlines() if "MemTotal" in line)
    cpu, gpu = device_name("cpu").partition(",")[0], device_name("cuda") if torch.cuda.is_available() else "no GPU"
    return f"{cpu}, {os.cpu_count()} cores, {round(int(total) / 2**20)} GiB, {gpu}"


def commit() -> str:
    """The commit that is checked out, with a + when files have changed since."""
    try:
        head = subprocess.check_output(
            ["git", "rev-parse", "--short", "HEAD"], text=True, stderr=subprocess.DEVNULL
        ).strip()
        changed = subprocess.check_output(
            ["git", "status", "--porcelain", "-uno"], text=True, stderr=subprocess.DEVNULL
        )
        return head + ("+" if changed.strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def write_rows(path: Path, rows: list[dict]) -> None:
    """Writes rows as JSON, one a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
