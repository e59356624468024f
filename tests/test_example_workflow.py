"""The example workflow: valid YAML, and every robbench command in it has the options it is given."""

import re
import shlex
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from robbench.cli.app import main

PATH = Path(__file__).parents[1] / "examples" / "github-workflow.yml"


def workflow() -> dict[Any, Any]:
    content = yaml.safe_load(PATH.read_text(encoding="utf-8"))
    assert isinstance(content, dict)
    return content


def commands() -> list[str]:
    """robbench commands of the steps, and of the comment that says how to begin."""
    steps = [step for job in workflow()["jobs"].values() for step in job["steps"]]
    lines = [line for step in steps for line in str(step.get("run", "")).splitlines()]
    comments = [
        line.removeprefix("#").strip() for line in PATH.read_text().splitlines() if line.startswith("#")
    ]
    return [part for line in lines + comments for part in line.split(" && ") if part.startswith("robbench ")]


@pytest.mark.parametrize("command", commands())
def test_every_command_exists_with_its_options(command: str) -> None:
    name, *arguments = shlex.split(command)[1:]
    found = main.get_command(click.Context(main), name)
    assert found is not None
    found.make_context(name, arguments)  # an unknown option, or a wrong value, raises


def test_it_runs_checks_reports_and_draws_a_badge() -> None:
    assert {command.split()[1] for command in commands()} == {"run", "check", "report", "badge"}


def test_it_is_a_workflow() -> None:
    content = workflow()
    assert set(content[True]) == {"pull_request", "push"}  # YAML 1.1 reads the key "on" as true
    for job in content["jobs"].values():
        assert job["runs-on"] == "ubuntu-latest"
        assert all(("uses" in step) != ("run" in step) for step in job["steps"])
    needed = {job["needs"] for job in content["jobs"].values() if "needs" in job}
    assert needed <= set(content["jobs"])


def test_what_is_kept_is_what_the_commands_write() -> None:
    steps = workflow()["jobs"]["check"]["steps"]
    kept = next(step["with"]["path"].split() for step in steps if "upload-artifact" in step.get("uses", ""))
    written = " ".join(commands())
    for path in kept:
        place = re.escape(path.split("/")[0])
        assert re.search(rf"(--out|-o|--json|--junit) {place}\b", written), path
