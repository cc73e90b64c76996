"""The `qswin` command: a table of commands, and how every one of them is run.

A command is a module of qat/commands with `add_arguments(parser)` and `main(args)`. Its module is imported only when it
is asked for, and imports torch only when it runs, so that help is instant and evaluating an ONNX file never needs
torch.
"""

import argparse
import contextlib
import difflib
import importlib
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NoReturn

from absl import app, logging
from absl.flags import argparse_flags

from qswin import limits
from qswin.calib.files import NotSaved, forget_saved, saved_files, version_of
from qswin.calib.messages import RED, LineFormatter, PrintableStream, coloured, printable

COMMANDS = {
    "quantize": "from trained weights and a folder of images to an INT8 graph and a report, in one go",
    "models": "list the models that can be quantized",
    "init": "say what trained weights of any library are, and write a config for them",
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
    "package": "make a folder to deploy of a run's model files, or a Triton model repository",
    "completion": "print a script that completes commands and options in bash, zsh or tcsh",
}

STOPPED = 130  # the exit code
OUT_OF_MEMORY = ("can't allocate memory", "out of memory")  # in torch's RuntimeErrors
ERROR = "error:"
VERBOSE = "--verbosity=1"
NAMED = 8  # files of a list in one line
UNSAVED = "every file that it wrote is whole; the same command starts again"

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


class Parser(argparse_flags.ArgumentParser):
    """Takes a command's arguments and absl's flags, but for --flagfile, which prints any file in its error.

    `-v` takes no number here, as people expect of it.
    """

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if any(re.match("--?flagfile(=|$)", arg) for arg in args):
            self.error("--flagfile is off; write the flags out")
        args = [VERBOSE if arg in ("-v", "--verbose") else arg for arg in args]
        return super().parse_known_args(args, namespace)  # type: ignore[no-untyped-call]

    def _print_message(self, message: str, file: Any = None) -> None:
        super()._print_message(printable(message, keep="\n"), file)


def run(add_arguments: AddArguments, main: Main, prog: str, argv: list[str]) -> None:
    """Parses the command line, runs `main` and exits.

    The code is 0; 2 after one line about what the user can mend; or 130 after one line when it was stopped by Ctrl-C or
    SIGTERM: a KeyboardInterrupt's message says what was saved. A closed standard output ends it quietly.

    Only ValueError, OSError and a lack of memory are the user's to mend; anything else is a defect and keeps its
    traceback. `--verbosity=1` shows the traceback of the first two as well.

    Args:
        argv: the arguments, without the program's name.
    """

    def parse(argv: list[str]) -> argparse.Namespace:
        parser = Parser(prog=prog, formatter_class=argparse.RawDescriptionHelpFormatter)  # type: ignore[no-untyped-call]
        add_arguments(parser)
        return parser.parse_args(argv[1:])

    def guarded(args: argparse.Namespace) -> None:
        forget_saved()
        try:
            with stopped_by_sigterm(), contextlib.redirect_stdout(PrintableStream(sys.stdout)):
                main(args)
                sys.stdout.flush()
        except BrokenPipeError:  # the reader, `head` say, has seen enough
            pass
        except KeyboardInterrupt as error:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            end(f"{prog}: stopped; {error}" if str(error) else f"{prog}: stopped; {UNSAVED}", STOPPED)
        except (ValueError, OSError) as error:
            logging.debug("traceback", exc_info=True)
            end(f"{prog}: error: {' '.join(str(error).split())}{_kept(error)}", 2)
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            end(f"{prog}: error: it takes more memory than there is; take smaller batches or fewer workers", 2)
        finally:
            discard_unwritten()

    open_closed_streams()
    logging.get_absl_handler().setFormatter(LineFormatter())
    app.run(guarded, argv=[prog, *argv], flags_parser=parse)


def _is_out_of_memory(error: Exception) -> bool:
    """Whether Python's, or torch's, on a CPU or a GPU."""
    return isinstance(error, MemoryError) or any(words in str(error) for words in OUT_OF_MEMORY)


def _kept(error: Exception) -> str:
    """What a command that could not save a file had saved before."""
    kept = saved_files() if isinstance(error, NotSaved) else []
    names = [*map(str, kept[:NAMED]), *([f"{len(kept) - NAMED} more"] if len(kept) > NAMED else [])]
    return f"; saved before it, and whole: {', '.join(names)}" if names else ""


def end(message: str, code: int) -> NoReturn:
    """Exits after one line on standard error. What the command held is let go first: it would complain at the exit."""
    traceback.clear_frames(sys.exc_info()[2])
    with contextlib.suppress(OSError):  # nobody reads it
        print(printable(message).replace(ERROR, coloured(ERROR, RED, sys.stderr), 1), file=sys.stderr)
    sys.exit(code)


@contextlib.contextmanager
def stopped_by_sigterm() -> Iterator[None]:
    """SIGTERM, which batch systems send, stops a command as Ctrl-C does: files that are half written go."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def open_closed_streams() -> None:
    """Opens /dev/null for each standard stream that is closed, lest a file of ours gets its descriptor."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))


def discard_unwritten() -> None:
    """Sends nowhere what cannot be written any more; Python would complain of it at the very end."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def run_command(command: str, argv: list[str]) -> None:
    """Runs one of COMMANDS with its arguments, and exits."""
    try:
        limits.scale()  # which the modules of commands read while they are imported
    except ValueError as error:
        end(f"qswin {command}: error: {error}", 2)
    try:
        module = command_module(command)
        run(module.add_arguments, module.main, f"qswin {command}", argv)
    except KeyboardInterrupt:  # before there was anything to save
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        end(f"qswin {command}: stopped; {UNSAVED}", STOPPED)


def main() -> None:
    """Entry point of the console script."""
    open_closed_streams()
    command, *arguments = sys.argv[1:] or ["--help"]
    if command == "help":
        command, arguments = (arguments or ["--help"])[0], ["--help"]
    if command in ("-h", "--help"):
        print("usage: qswin COMMAND [--help] ...\n       qswin help COMMAND\n       qswin --version\n")
        print("\n".join(f"  {name:<11} {summary}" for name, summary in COMMANDS.items()))
    elif command == "--version":
        print(f"qswin {version_of('qswin') or 'that is not installed'}")
    elif command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        what = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}"
        end(f"qswin: error: no command {command!r}; {what}", 2)
    else:
        run_command(command, arguments)
