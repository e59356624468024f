"""`robbench theory linear`: tables, files that do not change from run to run, and one line for every wrong use."""

import csv
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from robbench.cli.base import OneLineErrors
from robbench.cli.theory import RECURSIONS, theory
from robbench.theory.training import RECURSIONS as EXISTING

FILES = {
    "figure2-perturbations.png",
    "figure2-perturbations.svg",
    "figure2-perturbations.csv",
    "figure3-tradeoff.png",
    "figure3-tradeoff.svg",
    "figure3-tradeoff.csv",
    "theorem-bound.csv",
}


def invoked(*arguments: object) -> Result:
    main = OneLineErrors("robbench")
    main.add_command(theory)
    options = ["theory", "linear", *map(str, arguments)]
    return CliRunner().invoke(main, options, env={"COLUMNS": "80"})


def test_tables_and_files(tmp_path: Path) -> None:
    result = invoked("--samples", 500, "--out", tmp_path / "a")
    assert result.exit_code == 0, result.output
    for expected in ("paper_geometric", "17.77", "6.48", "6.584", "1.333", "7.99", "4.529", "never", "hard"):
        assert expected in result.stdout
    assert "…" not in result.stdout  # nothing cut off at 80 columns
    assert {path.name for path in (tmp_path / "a").iterdir()} == FILES
    assert invoked("--samples", 500, "--out", tmp_path / "b").exit_code == 0
    for name in FILES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    assert (tmp_path / "a" / "figure3-tradeoff.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "a" / "figure2-perturbations.svg").read_text()


def test_csv_holds_every_step_of_the_chosen_recursion(tmp_path: Path) -> None:
    options = ("--recursion", "refit", "--steps", 30, "--n", 3, "--samples", 200, "--seed", 5)
    assert invoked(*options, "--out", tmp_path).exit_code == 0
    with (tmp_path / "figure3-tradeoff.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["covariance"], int(row["step"])) for row in rows] == [
        (covariance, step) for covariance in ("spherical", "random") for step in range(31)
    ]
    assert {row["recursion"] for row in rows} == {"refit"}


@pytest.mark.parametrize(("option", "value"), [("--n", 1), ("--epsilon", 0), ("--steps", 0)])
def test_smallest_values(option: str, value: float, tmp_path: Path) -> None:
    result = invoked("--samples", 50, option, value, "--out", tmp_path)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--n", 0, "n=0"),
        ("--epsilon", -1, "epsilon=-1"),
        ("--epsilon", "nan", "no finite number"),
        ("--epsilon", 1e200, "epsilon=1e+200"),
        ("--sigma", 0, "sigma=0"),
        ("--steps", -1, "steps=-1"),
        ("--steps", 5000, "fewer steps"),
        ("--gamma", 1, "gamma=1"),
        ("--drop", 0, "drop=0"),
        ("--samples", 10, "samples=10"),
        ("--seed", -1, "--seed"),
        ("--recursion", "refitt", "--recursion"),
    ],
)
def test_wrong_use_is_one_line(option: str, value: object, message: str, tmp_path: Path) -> None:
    result = invoked(option, value, "--out", tmp_path / "out")
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


def test_command_module_imports_nothing_heavy() -> None:
    code = (
        "import sys, robbench.cli.theory; "
        "assert not {'numpy', 'scipy', 'torch', 'rich', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_recursions_on_the_command_line_are_all_there_are() -> None:
    assert RECURSIONS == EXISTING
    assert isinstance(theory, click.Group)
