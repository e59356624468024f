"""The nightly workflow: valid YAML, and the fuzzers it names are there and marked slow."""

import re
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]


def workflow() -> dict[Any, Any]:
    content = yaml.safe_load((ROOT / ".github" / "workflows" / "nightly.yml").read_text(encoding="utf-8"))
    assert isinstance(content, dict)
    return content


def test_it_runs_every_night_and_by_hand() -> None:
    content = workflow()
    assert set(content[True]) == {"schedule", "workflow_dispatch"}  # YAML 1.1 reads the key "on" as true
    assert content["permissions"] == {"contents": "read"}
    for job in content["jobs"].values():
        assert all(("uses" in step) != ("run" in step) for step in job["steps"])


def test_what_it_runs_is_there() -> None:
    commands = [str(step.get("run", "")) for job in workflow()["jobs"].values() for step in job["steps"]]
    places = [place for text in commands for place in re.findall(r"\btests/[\w/.]+", text)]
    assert "tests/fuzz" in places
    assert all((ROOT / place).exists() for place in places)
    assert all("-m slow" in text for text in commands if "pytest" in text)
