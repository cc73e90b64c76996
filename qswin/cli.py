"""The `qswin` command: a table of commands, and how every one of them is run.

A command is a module of qat/commands with `add_arguments(parser)` and `main(args)`. Its module is imported only when it
is asked for, and imports torch only when it runs, so that help is instant and evaluating an ONNX file never needs
torch.
"""

import argparse
import importlib
import sys
from collections.abc import Callable
from types import ModuleType

from absl import app, logging
from absl.flags import argparse_flags

COMMANDS = {
    "calibrate": "quantize a trained model and calibrate its ranges",
    "train": "fine-tune a quantized (QAT) or a float model; several processes: torchrun -m qswin train",
    "sensitivity": "rank the sites of a calibrated model by what quantizing each costs",
    "search": "find which sites to leave in float for a budget; write a recipe file",
    "convert": "convert a checkpoint that pytorch-quantization or ModelOpt calibrated",
    "export": "write a checkpoint as ONNX: INT8 with Q/DQ nodes, FP32 or FP16",
    "build": "build a TensorRT engine from an ONNX file, or a package of the project's INT8 kernels",
    "calib-cache": "make a calibration cache for implicit INT8, by TensorRT or offline",
    "evaluate": "Acc@1 and Acc@5, or Dice and HD95, of a checkpoint, an ONNX file or an engine",
    "bench": "time engines, ONNX files and checkpoints side by side",
    "compare": "errors of an engine or ONNX file against an ONNX file, by output or layer",
    "doctor": "say what this machine can do, and what adds what is missing",
    "inspect": "list a checkpoint's quantizers, or the layers of an engine or ONNX file",
    "report": "one HTML page of everything in a run's folder",
    "completion": "print a script that completes commands and options in bash, zsh or tcsh",
}

AddArguments = Callable[[argparse.ArgumentParser], None]
Main = Callable[[argparse.Namespace], None]


def command_module(command: str) -> ModuleType:
    """The module of qat/commands that a command is in."""
    return importlib.import_module(f"qswin.qat.commands.{command.replace('-', '_')}")


def whole_parser() -> argparse.ArgumentParser:
    """All commands in one parser, for completion and the reference page; `qswin` makes that of one command only."""
    parser = argparse.ArgumentParser(prog="qswin")
    commands = parser.add_subparsers()
    for name, summary in COMMANDS.items():
        command_module(name).add_arguments(commands.add_parser(name, help=summary))
    return parser


def run(add_arguments: AddArguments, main: Main, prog: str, argv: list[str]) -> None:
    """Parses the command line, runs `main` and exits: 0, or 2 after one line about what the user can mend.

    Only ValueError and OSError are the user's to mend; anything else is a defect and keeps its traceback, and
    `--verbosity=1` shows the traceback of those two as well.

    Args:
        argv: the arguments, without the program's name.
    """

    def parse(argv: list[str]) -> argparse.Namespace:
        parser = argparse_flags.ArgumentParser(prog=prog, formatter_class=argparse.RawDescriptionHelpFormatter)
        add_arguments(parser)
        return parser.parse_args(argv[1:])

    def guarded(args: argparse.Namespace) -> None:
        try:
            main(args)
        except BrokenPipeError:  # the reader, `head` say, has seen enough
            sys.stderr.close()
        except (ValueError, OSError) as error:
            logging.debug("traceback", exc_info=True)
            message = " ".join(str(error).split())
            print(f"{prog}: error: {message}", file=sys.stderr)
            sys.exit(2)

    app.run(guarded, argv=[prog, *argv], flags_parser=parse)


def run_command(command: str, argv: list[str]) -> None:
    """Runs one of COMMANDS with its arguments, and exits."""
    module = command_module(command)
    run(module.add_arguments, module.main, f"qswin {command}", argv)


def main() -> None:
    """Entry point of the console script."""
    command = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if command in ("-h", "--help"):
        print("usage: qswin COMMAND [--help] ...\n")
        print("\n".join(f"  {name:<11} {summary}" for name, summary in COMMANDS.items()))
        return
    if command not in COMMANDS:
        print(f"qswin: error: no command {command!r}; there are {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    run_command(command, sys.argv[2:])
