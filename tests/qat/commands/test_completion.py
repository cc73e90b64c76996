"""The completion script in a real bash."""

import shutil
import subprocess

import pytest

from qswin import cli
from qswin.qat.commands.completion import main

pytest.importorskip("shtab", reason="shtab is not installed")
ASK = """
source {script}
COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
_shtab_qswin
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.fixture
def complete(tmp_path, capsys):
    main(type("Arguments", (), {"shell": "bash"}))
    (script := tmp_path / "qswin.bash").write_text(capsys.readouterr().out)

    def ask(words: str) -> list[str]:
        done = subprocess.run(["bash", "-c", ASK.format(script=script, words=words)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    return ask


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_commands_and_options_are_completed(complete):
    assert complete("qswin cal") == ["calibrate", "calib-cache"]
    assert complete("qswin build --prec") == ["--precision"]
    assert complete("qswin build --target ''") == ["bundle", "inductor", "tensorrt", "tensorrt-rtx"]


def test_every_command_is_there():
    (commands,) = (action for action in cli.whole_parser()._actions if action.choices)
    assert list(commands.choices) == list(cli.COMMANDS)
