"""Writes docs/tutorial.ipynb from docs/tutorial.py, whose cells begin with `# %%`: python docs/make_notebook.py"""

import json
import re
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).with_name("tutorial.py")
PAGE = SCRIPT.with_suffix(".ipynb")
MARK = re.compile(r"^# %%(?P<markdown> \[markdown\])?\n", re.M)


def cell(number: int, text: str, markdown: bool) -> dict[str, Any]:
    """A cell of the notebook format, without outputs; the lines of a text cell lose their `# `."""
    text = re.sub(r"^# ?", "", text, flags=re.M) if markdown else text
    found = {"id": f"cell-{number}", "metadata": {}, "source": text.strip("\n").splitlines(keepends=True)}
    if markdown:
        return {"cell_type": "markdown", **found}
    return {"cell_type": "code", "execution_count": None, "outputs": [], **found}


def page() -> str:
    """The notebook as JSON, format 4.5."""
    _, *parts = MARK.split(SCRIPT.read_text())
    pairs = zip(parts[::2], parts[1::2], strict=True)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook = {
        "cells": [cell(number, text, bool(mark)) for number, (mark, text) in enumerate(pairs)],
        "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
