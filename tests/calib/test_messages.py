"""What is printed of names from elsewhere: nothing that a terminal obeys, and a line is a line."""

import io
import logging

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
