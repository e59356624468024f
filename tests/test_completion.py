"""Completion, as a real bash asks for it; without torch, which would make every TAB wait for seconds."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from detection_zoo import write_detector

from robbench.cli.app import main
from robbench.core.resources import data_root

BASH = shutil.which("bash")


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bash script, and a `robbench` beside it that is this checkout's."""
    folder = tmp_path_factory.mktemp("completion")
    result = CliRunner().invoke(main, ["completion", "bash"])
    assert result.exit_code == 0
    (folder / "completion.bash").write_text(result.output)
    command = folder / "robbench"
    command.write_text(
        f'#!/bin/sh\nexec "{sys.executable}" '
        '-c \'from robbench.cli.app import main; main(prog_name="robbench")\' "$@"\n'
    )
    command.chmod(0o755)
    return folder / "completion.bash"


def completed(script: Path, *words: str) -> list[str]:
    """What bash offers for the last of `words`."""
    if BASH is None:
        pytest.skip("bash is not installed")
    lines = [
        f"export PATH={script.parent}:$PATH",
        f"source {script}",
        f"COMP_WORDS=(robbench {' '.join(repr(word) for word in words)})",
        f"COMP_CWORD={len(words)}",
        "_robbench_completion robbench",
        'printf "%s\\n" "${COMPREPLY[@]}"',
    ]
    done = subprocess.run([BASH, "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    assert "Traceback" not in done.stderr
    return [line for line in done.stdout.splitlines() if line]


def cards() -> dict[str, dict[str, object]]:
    paths = sorted((data_root() / "zoo").glob("*/card.yaml"))
    return {path.parent.name: yaml.safe_load(path.read_text()) for path in paths}


def test_commands_and_options(script: Path) -> None:
    assert completed(script, "wat") == ["watch"]
    assert "--attacks" in completed(script, "run", "--att")


def test_attacks_and_the_last_item_of_a_list(script: Path) -> None:
    linf = yaml.safe_load((data_root() / "threat_models" / "linf.yaml").read_text())["attacks"]
    offered = completed(script, "run", "--attacks", "pgd20,pgd")
    assert {f"pgd20,{name}" for name in linf if name.startswith("pgd")} - {"pgd20,pgd20"} <= set(offered)
    assert "pgd20,pgd20" not in offered  # it is in the list already
    assert all(name.startswith("pgd20,pgd") for name in offered)


def test_models_defenses_and_data_sets(script: Path) -> None:
    assert completed(script, "run", "--model", "digits-m") == [n for n in cards() if n.startswith("digits-m")]
    offered = completed(script, "run", "--defense", "ijsat,")
    assert offered == sorted(
        f"ijsat,{name}" for name in {str(c["defense"]) for c in cards().values()} - {"ijsat"}
    )
    assert completed(script, "run", "--dataset", "fash") == ["fashionmnist"]
    assert completed(script, "list", "threat") == ["threat-models"]


def test_whatever_show_knows(script: Path) -> None:
    assert {"jsa50", "jsa-at"} <= {*completed(script, "show", "jsa")}


def test_folders_given_before_are_searched_too(script: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "{name: mine, space: image, norm: linf, description: d, budgets: {}, attacks: {my-pgd: {algorithm: pgd}}}"
    )
    options = ("run", "--threat-models", str(tmp_path), "--attacks", "my-")
    assert completed(script, *options) == ["my-pgd"]
    (tmp_path / "mine.yaml").write_text("name: [")  # the command itself says what is wrong; a shell could not
    assert completed(script, *options) == []


NO_TORCH = """
import os, sys
os.environ.update(_ROBBENCH_COMPLETE="bash_complete", COMP_WORDS={words!r}, COMP_CWORD={position!r})
from robbench.cli.app import main
try:
    main(args=[], prog_name="robbench")
except SystemExit as end:
    assert not end.code
heavy = {{"torch", "pandas", "numpy", "pyarrow", "sklearn"}} & set(sys.modules)
assert not heavy, heavy
"""


@pytest.mark.parametrize(
    ("words", "one"),
    [
        ("robbench run --attacks pgd20,a", "pgd20,aa"),
        ("robbench run --defense ij", "ijsat"),
        ("robbench run --model digits-at,digits-ij", "digits-at,digits-ijsat"),
        ("robbench run --dataset dig", "digits"),
        ("robbench show jsa", "jsa50"),
        ("robbench train --recipe ijsat-ci", "ijsat-cifar"),
        ("robbench run --experiment flow-lp-table12", "flow-lp-table12"),
    ],
)
def test_nothing_heavy_is_imported(words: str, one: str) -> None:
    code = NO_TORCH.format(words=words, position=str(len(words.split()) - 1))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"plain,{one}" in done.stdout.splitlines()


@pytest.mark.parametrize(("shell", "mark"), [("zsh", "#compdef robbench"), ("fish", "complete --no-files")])
def test_scripts_of_the_other_shells(shell: str, mark: str) -> None:
    result = CliRunner().invoke(main, ["completion", shell])
    assert result.exit_code == 0
    assert mark in result.output
    assert "_ROBBENCH_COMPLETE" in result.output


def test_another_shell_is_an_error() -> None:
    result = CliRunner().invoke(main, ["completion", "tcsh"])
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert "bash" in result.stderr


def test_models_are_completed_with_the_detectors_of_a_zoo(
    script: Path, tiny_zoo: Path, tmp_path: Path
) -> None:
    """The classifiers that they guard are named by them."""
    shutil.copytree(tiny_zoo / "tiny-a", tmp_path / "tiny-a")
    write_detector(tmp_path, "zero")
    found = completed(script, "run", "--zoo", str(tmp_path), "--model", "tiny-")
    assert found == ["tiny-a", "tiny-zero"]
