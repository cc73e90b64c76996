"""Shell completion, by shtab, of every command's options. The command `qswin completion`."""

import argparse

from qswin import cli

SHELLS = ("bash", "zsh", "tcsh")


def whole_parser() -> argparse.ArgumentParser:
    """All commands in one parser; `qswin` itself makes that of one command only."""
    parser = argparse.ArgumentParser(prog="qswin")
    commands = parser.add_subparsers()
    for name, summary in cli.COMMANDS.items():
        cli.command_module(name).add_arguments(commands.add_parser(name, help=summary))
    return parser


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Prints a script that completes qswin's commands and options."
    parser.epilog = "example:\n  qswin completion --shell bash > ~/.local/share/bash-completion/completions/qswin"
    parser.add_argument("--shell", choices=SHELLS, default="bash")


def main(args: argparse.Namespace) -> None:
    try:
        import shtab
    except ImportError as error:
        raise ValueError("completion needs shtab: pip install shtab") from error
    print(shtab.complete(whole_parser(), shell=args.shell))
