"""`torchrun --nproc_per_node N qat/train.py --config FILE ...`: the command `qswin train`, in every process.

With the installed package it is `torchrun --nproc_per_node N -m qswin train --config FILE ...`.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a file: nothing in this folder may stand in for another library
    folder = str(Path(__file__).resolve().parent)
    sys.path = [entry for entry in sys.path if entry != folder]

if __name__ == "__main__":
    from qswin.cli import run_command

    run_command("train", sys.argv[1:])
