"""`robbench list` takes singulars, and `robbench doctor` wraps its lines on a terminal."""

import shutil
import sys

import pytest
from click.testing import CliRunner

from robbench.cli import doctor
from robbench.cli.app import main


def test_a_singular_lists_what_its_plural_does():
    plural, singular = (CliRunner().invoke(main, ["list", kind]) for kind in ("defenses", "defense"))
    assert plural.exit_code == singular.exit_code == 0
    assert plural.output == singular.output != ""


@pytest.mark.parametrize("wrong", ["attackss", "defens", ""])
def test_no_other_word_is_taken(wrong):
    assert CliRunner().invoke(main, ["list", wrong]).exit_code == 2


@pytest.mark.parametrize("terminal", [True, False])
def test_findings_fit_a_terminal_and_keep_their_line_elsewhere(monkeypatch, capsys, terminal):
    details = "downloaded at first use, or name its folder with --data-dir or ROBBENCH_DATA, as the page on data says"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr(shutil, "get_terminal_size", lambda: shutil.os.terminal_size((80, 24)))
    doctor._echo_finding("missing", "fashionmnist", details)
    lines = capsys.readouterr().out.splitlines()
    assert (len(lines) == 1) != terminal
    assert max(map(len, lines)) <= 80 or not terminal
    assert " ".join(" ".join(lines).split()) == f"missing fashionmnist {details}"
