"""`torchrun --nproc_per_node N qat/train.py --config FILE ...`: the command `qswin train`, in every process."""

import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a file: nothing in this folder may stand in for another library
    sys.path.remove(str(Path(__file__).resolve().parent))

if __name__ == "__main__":
    from qswin.cli import run_command

    run_command("train", sys.argv[1:])
