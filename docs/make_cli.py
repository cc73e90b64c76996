"""Writes docs/cli.md, every command and flag, from the parsers: python docs/make_cli.py"""

import argparse
import html
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qswin import cli
from qswin.qat.commands.arguments import above_zero, count, positive

PAGE = Path(__file__).with_name("cli.md")
HEAD = """\
# Commands

Written by `python docs/make_cli.py` from the parsers. `qswin COMMAND --help` says the same.

Every command also takes `-v`, which shows time, process and place of each line and the traceback of an error. A file
that standard error goes to gets time and place anyway. Warnings are coloured on a terminal, unless `NO_COLOR` is set.
absl's other flags are taken too, but for `--flagfile`.

"""
TYPES = {Path: "path", int: "integer", float: "number", None: "text", str: "text"}
TYPES |= {count: "integer, 0 or more", positive: "integer, 1 or more", above_zero: "number above 0"}


def takes(action: argparse.Action) -> str:
    """What a flag's value is."""
    if action.nargs == 0:
        return "switch"
    if action.choices is not None:
        kind = ", ".join(f"`{choice}`" for choice in action.choices)
    elif isinstance(action.metavar, str) and action.option_strings:
        kind = action.metavar
    else:
        kind = TYPES.get(action.type, "text")  # of a function that parses: what it is given
    if isinstance(action, argparse._AppendAction):
        return f"{kind}, repeatable"
    return f"{kind}, several" if action.nargs in ("*", "+") else kind


def default(action: argparse.Action) -> str:
    """The value without the flag, as it is typed; nothing where the sentence says what happens instead."""
    if action.required and action.nargs not in ("*", "?"):  # which argparse calls required, of arguments without a name
        return "required"
    if action.nargs == 0 or action.default in (None, [], ()):
        return ""
    values = action.default if isinstance(action.default, list | tuple) else [action.default]
    return f"`{' '.join(map(str, values))}`"


def names(action: argparse.Action) -> str:
    own = [action.metavar] if isinstance(action.metavar, str) else [action.dest]
    return ", ".join(f"`{name}`" for name in action.option_strings or own)


def line(cells: Iterable[str]) -> str:
    """A line of a Markdown table."""
    return "|" + "|".join(f" {cell} " if cell else " " for cell in (cell.replace("|", r"\|") for cell in cells)) + "|"


def section(command: str, summary: str, parser: argparse.ArgumentParser) -> str:
    """A command: what it does, an example, and a table of its flags.

    Args:
        summary: its line in the table of commands, for a parser without a description.
    """
    formatter: Any = parser._get_formatter()
    example = (parser.epilog or "").removeprefix("example:\n")
    about = html.escape(parser.description or summary, quote=False)
    lines = [f"## qswin {command}", "", *textwrap.wrap(about, 120, break_on_hyphens=False), "", "```sh"]
    lines += [text.strip() for text in example.splitlines()]
    lines += ["```", "", "| flag | value | default | |", "| --- | --- | --- | --- |"]
    for action in parser._actions:
        if not isinstance(action, argparse._HelpAction):
            sentence = html.escape(formatter._expand_help(action), quote=False) if action.help else ""
            lines.append(line((names(action), takes(action), default(action), sentence)))
    return "\n".join(lines) + "\n"


def page() -> str:
    """The whole page."""
    (commands,) = (action.choices for action in cli.whole_parser()._actions if action.choices)
    listed = "".join(f"- [{name}](#qswin-{name}): {summary}\n" for name, summary in cli.COMMANDS.items())
    sections = [section(name, summary, commands[name]) for name, summary in cli.COMMANDS.items()]
    return HEAD + listed + "\n" + "\n".join(sections)


if __name__ == "__main__":
    PAGE.write_text(page())
