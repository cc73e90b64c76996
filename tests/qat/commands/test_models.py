"""`qswin models`: every name that can be built, and the nearest to one that cannot."""

import json

from qswin.models.registry import families
from tests.helpers import fails, invoke


def test_all_of_a_pattern_are_listed(tmp_path, capsys):
    assert invoke("models", "--json", tmp_path / "all.json") == 0
    rows = json.loads((tmp_path / "all.json").read_text())["rows"]
    assert {row["model"] for row in rows} == {name for family in families() for name in family.names()}
    capsys.readouterr()
    assert invoke("models", "swinv2_tiny_*") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 1
    for family, task, name in map(str.split, lines):
        assert (family, task) == ("swin", "classification") and name.startswith("swinv2_tiny_")


def test_none_is_an_error_that_says_what_comes_nearest(capsys):
    assert "is called swin_tiny_patch4_window7_224 here" in fails(capsys, "models", "swin_t")
    assert "the nearest names are swin_" in fails(capsys, "models", "swin_tiny_patch4_window7_22")
