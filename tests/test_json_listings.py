"""`--json` of the listing commands: JSON alone on stdout, stable keys, every number in full."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from robbench.cli import catalog
from robbench.cli.app import KINDS, main
from robbench.core.resources import data_root

KEYS = {
    "attacks": {
        "name",
        "target",
        "threat_model",
        "space",
        "norm",
        "pixel_range",
        "members",
        "algorithm",
        "description",
        "reference",
    },
    "threat-models": {"name", "target", "space", "norm", "pixel_range", "attacks", "description"},
    "models": {
        "name",
        "kind",
        "dataset",
        "defense",
        "architecture",
        "description",
        "folder",
        "weights",
        "weights_sha256",
    },
    "datasets": {"name", "train", "test", "license", "source", "embedded", "path"},
    "defenses": {"name", "trains", "description"},
    "detectors": {"name", "description"},
    "recipes": {"name", "of", "datasets", "description"},
    "experiments": {"name", "source", "published", "dataset", "description"},
    "published": {"name", "source", "kind", "rows", "gated", "paper", "description"},
}


def parsed(*arguments: object) -> Any:
    result = CliRunner().invoke(main, [*map(str, arguments), "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def shown(name: str, *arguments: object) -> dict[str, dict[str, Any]]:
    found = parsed("show", name, *arguments)
    assert found["name"] == name
    return {thing["kind"]: thing["entry"] for thing in found["found"]}


def test_every_kind_that_can_be_asked_for_is_known() -> None:
    assert set(KINDS) == set(catalog.KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_every_list_has_its_keys_and_the_entries_of_the_plain_list(kind: str) -> None:
    found = parsed("list", kind)
    assert all(set(entry) == KEYS[kind] for entry in found)
    lines = CliRunner().invoke(main, ["list", kind]).stdout.splitlines()
    assert [entry["name"] for entry in found] == [line.split("\t")[0] for line in lines]
    assert found


def test_documented_keys_are_these() -> None:
    text = (Path(__file__).parents[1] / "docs" / "living.md").read_text(encoding="utf-8")
    for kind, keys in KEYS.items():
        line = next(line for line in text.splitlines() if line.startswith(f"| `list {kind}` |"))
        assert {part.strip("` ") for part in line.split("|")[2].split(",")} == keys


def test_numbers_of_an_attack_are_those_of_its_file() -> None:
    model = yaml.safe_load((data_root() / "threat_models" / "linf.yaml").read_text())
    entry = shown("pgd20")["attack"]
    budgets = {budget["dataset"]: budget for budget in entry["budgets"]}
    assert budgets.keys() == model["budgets"].keys()
    for dataset, budget in model["budgets"].items():
        epsilon = budget.get("epsilon")
        assert budgets[dataset]["epsilon"] == epsilon
        # a quarter of epsilon a step
        assert budgets[dataset]["step_sizes"] == (None if epsilon is None else pytest.approx([epsilon / 4]))
    assert entry["parameters"]["steps"] == 20
    assert entry["members"] is None


def test_a_group_lists_its_members() -> None:
    assert "c-fog-3" in shown("corruptions")["attack"]["members"]


def test_everything_of_one_name() -> None:
    assert list(shown("r-la")) == ["attack", "defense"]
    assert list(shown("linf")) == ["threat model"]
    assert list(shown("digits")) == ["recipe", "data set"]
    assert list(shown("ijsat-table1")) == ["experiment", "published table"]


def test_a_model_has_its_whole_card() -> None:
    entry = shown("digits-at")["model"]
    card = yaml.safe_load((data_root() / "zoo" / "digits-at" / "card.yaml").read_text())
    assert entry["weights_sha256"] == card["weights"]["sha256"] == entry["card"]["weights"]["sha256"]
    assert entry["card"]["measurements"][0]["value"] == card["measurements"][0]["value"]


def test_published_numbers_are_numbers_and_keep_their_print() -> None:
    numbers = shown("IJSAT Table 1")["published table"]["numbers"]
    assert len(numbers) == 63
    for number in numbers:
        assert number["value"] is None or float(number["printed"]) == number["value"]
    lines = (data_root() / "reports" / "published" / "ijsat-table1.csv").read_text().splitlines()
    column = lines[0].split(",").index("value")
    assert lines[1].split(",")[column] == numbers[0]["printed"]


def test_a_defense_has_its_parameters() -> None:
    (trains,) = shown("trades")["defense"]["trains"]
    assert trains["kind"] == "classifier"
    assert trains["parameters"]["beta"] == 6.0


def test_a_data_set_that_is_not_here_has_no_card(tmp_path: Path) -> None:
    entry = shown("svhn", "--data-dir", tmp_path)["data set"]
    assert (entry["path"], entry["card"], entry["test"]) == (None, None, 26_032)


def test_doctor(tmp_path: Path) -> None:
    found = parsed("doctor", "--data-dir", tmp_path)
    assert found["healthy"] is True
    findings = {entry["what"]: entry for entry in found["findings"]}
    assert findings["torch"]["section"] == "Packages"
    assert findings["mnist"]["state"] == "missing"
    assert all(set(entry) == {"section", "state", "what", "details"} for entry in found["findings"])


def test_an_unknown_name_is_one_line_on_stderr_and_nothing_on_stdout() -> None:
    result = CliRunner().invoke(main, ["show", "pgd21", "--json"])
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1
