"""`qswin completion`."""

import argparse

from qswin import cli

SHELLS = ("bash", "zsh", "tcsh")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Prints a script that completes qswin's commands and options."
    parser.epilog = "example:\n  qswin completion --shell bash > ~/.local/share/bash-completion/completions/qswin"
    parser.add_argument("--shell", choices=SHELLS, default="bash", help="the shell that is to complete them")


def main(args: argparse.Namespace) -> None:
    try:
        import shtab
    except ImportError as error:
        raise ValueError("completion needs shtab: pip install shtab") from error
    print(shtab.complete(cli.whole_parser(), shell=args.shell))
