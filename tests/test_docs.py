"""The documentation says what the code says."""

import argparse
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from qswin import cli
from qswin.trt.graphs.runtime import OnnxRuntimePredictor

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "SECURITY.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]


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


def test_the_api_page_has_every_public_name_once():
    pytest.importorskip("triton", reason="Triton is not installed, whose kernels the page describes")
    make_api = script("make_api")
    assert len(make_api.MODULES) == len(set(make_api.MODULES))
    expected = [member for name in make_api.MODULES for _, member in make_api.public(importlib.import_module(name))]
    found = [each.member for each in make_api.entries()]
    assert len(found) == len(expected) and set(found) == set(expected) >= set(make_api.FACE.values())
    headings = re.findall(r"^##+ (.*)", make_api.page(), re.M)
    anchors = [make_api.anchor(heading) for heading in headings]
    assert len(anchors) == len(set(anchors))
    assert set(re.findall(r"\(#(.*?)\)", make_api.page())) <= set(anchors)


def test_a_name_that_a_module_lacks_cannot_be_moved(monkeypatch):
    pytest.importorskip("triton", reason="Triton is not installed, whose kernels the page describes")
    make_api = script("make_api")
    monkeypatch.setitem(make_api.MOVED, "qswin.qat.checkpoint", {"Train": ("no_such",)})
    with pytest.raises(ValueError, match="MOVED: qswin.qat.checkpoint lacks no_such"):
        make_api.entries()


def test_the_config_page_is_what_the_schema_says():
    make_config = script("make_config")
    assert make_config.PAGE.read_text() == make_config.page(), "run python docs/make_config.py"


def test_the_notebook_is_the_script():
    make_notebook = script("make_notebook")
    assert make_notebook.PAGE.read_text() == make_notebook.page(), "run python docs/make_notebook.py"
    assert not [cell for cell in json.loads(make_notebook.page())["cells"] if cell.get("outputs")]


@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
    cells = json.loads((ROOT / "docs" / "tutorial.ipynb").read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    code.append("import json; print(json.dumps([in_float, in_int8, in_onnx, same, seen, verdict.good]))")
    program, one_core = [sys.executable, "-c", "\n\n".join(code)], os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(program, cwd=tmp_path, env=one_core, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    in_float, in_int8, in_onnx, same, seen, good = json.loads(done.stdout.splitlines()[-1])
    assert in_float > 80 and abs(in_int8 - in_float) < 2 and abs(in_onnx - in_float) < 2
    assert same > 95 and seen == 256 and good
    assert OnnxRuntimePredictor(tmp_path / "int8.onnx").precision == "int8"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M)
    for target in re.findall(r"\]\(([^)#][^)]*)\)", prose):
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


def named(entries) -> list[str]:
    """The files that a nav of MkDocs names, at any depth."""
    if isinstance(entries, str):
        return [entries]
    return [file for entry in entries for inner in entry.values() for file in named(inner)]


def test_each_page_has_one_place_in_the_site_and_in_the_index():
    docs = ROOT / "docs"
    pages = sorted(page.relative_to(docs).as_posix() for page in docs.rglob("*.md"))
    nav = named(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert sorted(file for file in nav if not file.startswith("repository/")) == pages
    assert all((ROOT / file.removeprefix("repository/")).exists() for file in nav if file.startswith("repository/"))
    links = re.findall(r"\]\(([^)#:]+\.md)\)", (docs / "index.md").read_text())
    assert sorted(["index.md", *(link for link in links if not link.startswith("../"))]) == pages


def command_lines(page):
    """(command, its words) of each line `qswin COMMAND ...` in a block of shell commands, fenced or indented."""
    text = page.read_text().replace("\\\n", " ")
    fenced = re.findall(r"^```sh\n(.*?)^```", text, re.S | re.M)
    indented = re.findall(r"^ {4}.*$", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M), re.M)
    for line in "\n".join([*fenced, *indented]).splitlines():
        found = re.match(r"\s*(?:\S+/)?qswin (\S+)(.*)", line.split("#")[0])
        if found:
            yield found[1], found[2].split()


COMMANDS: dict[str, argparse.ArgumentParser] = next(a for a in cli.whole_parser()._actions if a.choices).choices


def test_the_page_of_commands_is_what_the_parsers_say():
    make_cli = script("make_cli")
    assert make_cli.PAGE.read_text() == make_cli.page(), "run python docs/make_cli.py"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_has_a_sentence(command):
    assert not [name(action) for action in COMMANDS[command]._actions if not (action.help or "").strip()]


def name(action: argparse.Action) -> str:
    return action.option_strings[0] if action.option_strings else action.dest


def test_the_page_shows_what_a_flag_takes():
    """Choices, defaults, numbers, switches, lists and what is required, of a parser made here."""
    parser = argparse.ArgumentParser(description="Bakes | sells.", epilog="example:\n  qswin bake cake")
    parser.add_argument("what", help="a cake")
    parser.add_argument("more", nargs="*", metavar="KEY=VALUE", help="settings")
    parser.add_argument("--oven", "-o", required=True, type=Path, help="a file")
    parser.add_argument("--heat", type=float, default=0.5, help="from 0 to 100 %%; usually %(default)s")
    parser.add_argument("--shape", choices=("round", "square"), default="round", help="of it")
    parser.add_argument("--layers", nargs="+", type=int, default=[1, 2], help="of cream | jam")
    parser.add_argument("--top", action="append", default=[], metavar="FRUIT", help="a fruit")
    parser.add_argument("--dry-run", action="store_true", help="do nothing <at all>")
    shown = script("make_cli").section("bake", "bake a cake", parser)
    assert shown.startswith("## qswin bake\n\nBakes | sells.\n\n```sh\nqswin bake cake\n```\n")
    assert shown.splitlines()[-8:] == [
        "| `what` | text | required | a cake |",
        "| `KEY=VALUE` | text, several | | settings |",
        "| `--oven`, `-o` | path | required | a file |",
        "| `--heat` | number | `0.5` | from 0 to 100 %; usually 0.5 |",
        "| `--shape` | `round`, `square` | `round` | of it |",
        "| `--layers` | integer, several | `1 2` | of cream \\| jam |",
        "| `--top` | FRUIT, repeatable | | a fruit |",
        "| `--dry-run` | switch | | do nothing &lt;at all&gt; |",
    ]


def test_commands_and_options_exist():
    lines = [(page.name, *line) for page in PAGES for line in command_lines(page)]
    assert len(lines) > 20
    for page, command, words in lines:
        assert command in COMMANDS, (page, command)
        options = {word.split("=")[0] for word in words if word.startswith("--")}
        assert options <= set(COMMANDS[command]._option_string_actions), (page, command)


def test_the_tests_that_the_table_of_checkpoints_names_exist():
    """Each cell names a test, with its case where there are several, or gives a reason."""
    pytest.importorskip("transformers")
    from tests.models.checkpoints.test_logits import HF_CASES
    from tests.qat.foreign.test_whole_way import CASES

    defined = set(re.findall(r"^def (test_\w+)", "".join(f.read_text() for f in (ROOT / "tests").rglob("*.py")), re.M))
    page = (ROOT / "docs" / "models.md").read_text()
    rows = [line.strip("| ").split(" | ")[-6:] for line in page.splitlines() if "`test_ptq[" in line]
    assert len(rows) == len(CASES)
    for cell in (cell for row in rows for cell in row):
        if not re.fullmatch(r"- \(.+\)", cell):
            name, _, case = cell.strip("`]").partition("[")
            assert name in defined and case in ("", *HF_CASES, *CASES), cell
    assert {row[1] for row in rows} == {f"`test_ptq[{case}]`" for case in CASES}
