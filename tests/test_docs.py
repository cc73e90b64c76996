"""The documentation says what the code says."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def script(name):
    """A Python file of docs/, imported."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_of_calibrators_is_what_they_do():
    for line in script("make_calibrators").table():
        assert line in (ROOT / "docs" / "calibrators.md").read_text()


def test_the_api_page_is_what_the_docstrings_say():
    pytest.importorskip("triton", reason="Triton is not installed, whose kernels the page describes")
    make_api = script("make_api")
    assert make_api.PAGE.read_text() == make_api.page(), "run python docs/make_api.py"


def test_the_config_page_is_what_the_schema_says():
    make_config = script("make_config")
    assert make_config.PAGE.read_text() == make_config.page(), "run python docs/make_config.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#][^)]*)\)", page.read_text()):
        if not target.startswith("http"):
            path, _, anchor = target.partition("#")
            assert (file := page.parent / path).exists(), target
            headings = (
                [
                    re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).strip().replace(" ", "-")
                    for line in file.read_text().splitlines()
                    if line.startswith("#")
                ]
                if anchor
                else [""]
            )
            assert anchor in headings, target


def command_lines(page):
    """(command, its words) of each line `qswin COMMAND ...` in a block of shell commands, fenced or indented."""
    text = page.read_text().replace("\\\n", " ")
    fenced = re.findall(r"^```sh\n(.*?)^```", text, re.S | re.M)
    indented = re.findall(r"^ {4}.*$", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M), re.M)
    for line in "\n".join([*fenced, *indented]).splitlines():
        found = re.match(r"\s*(?:\S+/)?qswin (\S+)(.*)", line.split("#")[0])
        if found:
            yield found[1], found[2].split()


def test_commands_and_options_exist():
    from qswin.qat.commands.completion import whole_parser

    (commands,) = (action for action in whole_parser()._actions if action.choices)
    lines = [(page.name, *line) for page in PAGES for line in command_lines(page)]
    assert len(lines) > 20
    for page, command, words in lines:
        assert command in commands.choices, (page, command)
        options = {word.split("=")[0] for word in words if word.startswith("--")}
        assert options <= set(commands.choices[command]._option_string_actions), (page, command)
