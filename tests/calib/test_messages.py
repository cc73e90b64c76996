"""What is printed of names from elsewhere: nothing that a terminal obeys, and a line is a line."""

import io
import logging
import os
import pty
import re
import subprocess
import sys

import pytest

from qswin.calib.messages import PrintableFormatter, PrintableStream, printable, text_of

EVIL = "a\x1b[31m\r\n\x07\x9b2J\u202eb\u2028c\udcff"
SAFE = "a\\x1b[31m\\r\\n\\x07\\x9b2J\\u202eb\\u2028c\\udcff"


@pytest.mark.parametrize(
    ("text", "expected"),
    [(EVIL, SAFE), ("Zürich 北京 €.onnx", "Zürich 北京 €.onnx"), ("a b\tc", "a b\\tc"), ("\U000e0041", "\\U000e0041")],
)
def test_what_a_terminal_would_obey_is_written_out(text, expected):
    assert printable(text) == expected and printable(expected) == expected
    assert text_of([text, "next"]) == f"{expected}\nnext"


def test_a_stream_keeps_lines_and_nothing_else():
    stream = io.StringIO()
    print(f"one\ttwo\n{EVIL}", file=PrintableStream(stream))
    assert stream.getvalue() == "one\ttwo\n" + SAFE.replace("\\n", "\n") + "\n"


def test_a_log_record_is_one_line():
    record = logging.LogRecord("absl", logging.WARNING, "x.py", 1, "%s: skipped", (EVIL,), None)
    assert PrintableFormatter().format(record).endswith(f"] {SAFE}: skipped")
    assert record.args == (EVIL,)  # other handlers see it as it is


def run_logging(environment=(), arguments=(), **redirected) -> bytes:
    """What a command logs to standard error."""
    script = (
        "from absl import logging\nfrom qswin import cli\n"
        "cli.run(lambda parser: None, lambda args: (logging.info('a %d', 1), logging.warning('b\\x1b')), 'qswin x', "
        f"{list(arguments)!r})"
    )
    variables = {key: value for key, value in os.environ.items() if key != "NO_COLOR"} | dict(environment)
    done = subprocess.run([sys.executable, "-c", script], env=variables, check=True, **redirected)
    return done.stderr


def test_a_pipe_gets_plain_lines_and_more_with_v():
    assert run_logging(stderr=subprocess.PIPE) == b"qswin: a 1\nqswin: warning: b\\x1b\n"
    assert run_logging({"RANK": "3"}, stderr=subprocess.PIPE).startswith(b"qswin[3]: a 1\n")
    assert re.fullmatch(rb"I\d{4} \S+ +\d+ \S+:\d+\] a 1\nW.*\n", run_logging((), ["-v"], stderr=subprocess.PIPE))


def test_a_file_gets_time_and_place(tmp_path):
    with (tmp_path / "log").open("wb") as file:
        run_logging(stderr=file)
    assert re.match(r"I\d{4} \S+ +\d+ \S+:\d+\] a 1\n", (tmp_path / "log").read_text())


@pytest.mark.parametrize(("no_color", "expected"), [("", b"\x1b[33mwarning: \x1b[0mb\\x1b"), ("1", b"warning: b\\x1b")])
def test_a_terminal_gets_colour_unless_it_is_declined(no_color, expected):
    ours, theirs = pty.openpty()
    run_logging({"NO_COLOR": no_color, "TERM": "xterm"}, stderr=theirs)
    os.close(theirs)
    assert expected in os.read(ours, 1000)
    os.close(ours)
