"""`python -m qswin COMMAND ...`, and `torchrun -m qswin COMMAND ...`."""

from qswin.cli import main

main()
