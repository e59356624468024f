"""The badge: the number of the tables, readable by people and machines, and never a number there is not."""

import json
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from click.testing import CliRunner
from publish_runs import make_run

from robbench.cli.app import main
from robbench.core.errors import UserError
from robbench.report import badge as module
from robbench.report.badge import Badge, badge_json, badge_of, badge_svg
from robbench.store.records import CellResult, Run

SVG = "{http://www.w3.org/2000/svg}"


def robust_by_hand(run: Run, model: str, attacks: set[str] | None = None) -> float:
    """Percentage of samples that no attack of the model broke."""
    found = [r for r in run.cells if r.cell.model == model and attacks in (None, {r.cell.attack.label})]
    return 100 * float(np.mean(np.all([r.rows["robust"].to_numpy() for r in found], axis=0)))


def test_the_numbers_are_those_of_the_rows(run: Run) -> None:
    worst = badge_of(run, "digits-ijsat", "worst-case")
    assert worst.message == f"{robust_by_hand(run, 'digits-ijsat'):.1f} %"
    one = badge_of(run, "digits-ijsat", "aa")
    assert one.message == f"{robust_by_hand(run, 'digits-ijsat', {'aa'}):.1f} %"
    assert one.label == "digits robust accuracy, aa (epsilon 0.2)"
    assert "digits-ijsat on digits, aa (epsilon 0.2): robust accuracy" in one.title
    assert "95 % interval" in one.title
    assert "n = 120, seed 3" in one.title
    assert badge_of(run, "digits-ijsat", "clean").label == "digits accuracy, clean"
    assert badge_of(run, "digits-ijsat", "average").message != worst.message


def test_a_single_classifier_needs_no_name(run: Run) -> None:
    alone = make_run(run.cells[:3], run.n)
    assert badge_of(alone, None, "aa") == badge_of(run, "digits-standard", "aa")


@pytest.mark.parametrize(
    ("model", "attack", "part"),
    [
        (None, "aa", "name one with --model: digits-standard, digits-ijsat"),
        ("digits-ijsta", "aa", "did you mean 'digits-ijsat'"),
        ("digits-ijsat", "pgd", "did you mean 'pgd20'"),
    ],
)
def test_wrong_names(run: Run, model: str | None, attack: str, part: str) -> None:
    with pytest.raises(UserError, match=part):
        badge_of(run, model, attack)


@pytest.mark.parametrize(
    ("model", "attack", "part"),
    [
        ("digits-ijsat", "aa", "failed .*left its set"),
        ("digits-ijsat", "worst-case", "failed .*aa failed"),
        ("digits-standard", "jsa50", "not run .*50 of 120 samples done"),
        ("digits-standard", "average", "not run"),
    ],
)
def test_a_number_there_is_not_gets_no_badge(damaged: Run, model: str, attack: str, part: str) -> None:
    with pytest.raises(UserError, match=part):
        badge_of(damaged, model, attack)
    assert badge_of(damaged, model, "pgd20").message


def test_a_suspicious_number_says_so_also_inside_a_worst_case(run: Run) -> None:
    first = run.cells[0]
    masked = CellResult(first.cell.model_copy(update={"suspicions": ("gradients are zero",)}), first.rows)
    doubted = make_run([masked, *run.cells[1:]], run.n)
    for attack in ("pgd20", "worst-case", "average"):
        found = badge_of(doubted, "digits-standard", attack)
        assert found.message.endswith(" (suspicious)")
        assert "suspicious" in found.title
    assert not badge_of(doubted, "digits-standard", "aa").suspicious
    assert not badge_of(doubted, "digits-ijsat", "worst-case").suspicious


# --------------------------------------------------------------------------------------------------------- SVG
def test_the_svg_is_accessible_and_the_same_every_time(run: Run) -> None:
    found = badge_of(run, "digits-ijsat", "aa")
    assert badge_svg(found) == badge_svg(badge_of(run, "digits-ijsat", "aa"))
    root = ElementTree.fromstring(badge_svg(found))
    assert root.get("role") == "img"
    assert root.get("aria-label") == found.title == root.findtext(f"{SVG}title")
    assert [text.text for text in root.iter(f"{SVG}text")] == [found.label, found.message]
    width = int(root.get("width") or 0)
    ends = [int(text.get("x") or 0) + int(text.get("textLength") or 0) for text in root.iter(f"{SVG}text")]
    assert ends[0] < ends[1] < width
    assert "http" not in badge_svg(found).replace("http://www.w3.org/2000/svg", "")


def test_any_name_is_escaped() -> None:
    hostile = Badge("<script>alert(1)</script>", '"&<', '"><script>')
    root = ElementTree.fromstring(badge_svg(hostile))
    assert [text.text for text in root.iter(f"{SVG}text")] == [hostile.label, hostile.message]
    assert not list(root.iter(f"{SVG}script"))


@pytest.mark.parametrize("name", ["LABEL_COLOUR", "PLAIN_COLOUR", "SUSPICIOUS_COLOUR"])
def test_white_text_has_the_contrast_of_wcag_aa(name: str) -> None:
    colour = getattr(module, name)
    channels = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    luminance = float(np.dot([0.2126, 0.7152, 0.0722], linear))
    assert 1.05 / (luminance + 0.05) >= 4.5


def test_the_endpoint_schema_of_shields(run: Run) -> None:
    found = badge_json(badge_of(run, "digits-ijsat", "aa"))
    assert found["schemaVersion"] == 1
    assert set(found) == {"schemaVersion", "label", "message", "color", "labelColor"}
    assert all(isinstance(found[key], str) and found[key] for key in ("label", "message", "color"))


# ----------------------------------------------------------------------------------------------------- command
@pytest.fixture
def folder(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("robbench.store.ledger.load_run", lambda _: run)
    return tmp_path


def test_the_command_writes_svg_and_json(folder: Path, run: Run) -> None:
    arguments = ["badge", str(folder), "--model", "digits-ijsat", "--attack", "aa"]
    found = badge_of(run, "digits-ijsat", "aa")
    written = CliRunner().invoke(main, [*arguments, "-o", str(folder / "new" / "badge.svg")])
    assert written.exit_code == 0, written.output
    assert (folder / "new" / "badge.svg").read_text() == badge_svg(found)
    assert CliRunner().invoke(main, arguments).stdout == badge_svg(found)
    assert json.loads(CliRunner().invoke(main, [*arguments, "--json"]).stdout) == badge_json(found)


def test_a_refusal_is_one_line_and_leaves_the_old_badge(folder: Path) -> None:
    (folder / "badge.svg").write_text("old")
    result = CliRunner().invoke(main, ["badge", str(folder), "-o", str(folder / "badge.svg")])
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert (folder / "badge.svg").read_text() == "old"
