"""Bundles of guarded classifiers: what `verify` computes again, and that it finds forged scores and thresholds."""

import json
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from detection_zoo import guarded_zoo, write_detector
from zoo_runs import Forgery, attacked, bundled, checked, differing, reason

from robbench.core.resources import sha256_file
from robbench.core.schema import dump_yaml
from robbench.models.zoo import read_detector
from robbench.store.ledger import load_run

MODEL, ATTACK = "tiny-mean", "fgsm"


@pytest.fixture(scope="module")
def zoo(tiny_zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """tiny-a, and a detector of it that flags bright images."""
    with guarded_zoo(tiny_zoo, tmp_path_factory.mktemp("guarded")) as folder:
        write_detector(folder, "mean", 0.32)
        yield folder


@pytest.fixture(scope="module")
def original(zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the guarded model and of its classifier. Read only."""
    folder = tmp_path_factory.mktemp("original") / "run"
    return attacked(folder, (MODEL, "tiny-a"), (ATTACK,), "--zoo", str(zoo))


@pytest.fixture
def forgery(original: Path, tmp_path: Path) -> Forgery:
    return Forgery(original, tmp_path)


def test_everything_agrees_and_the_detector_is_named_by_its_hash(
    original: Path, zoo: Path, tmp_path: Path
) -> None:
    bundle = bundled(original, tmp_path / "bundle.zip")
    result = checked(bundle, zoo=zoo, share=1.0)
    assert result.exit_code == 0, [f for f in result.findings if f.verdict != "agrees"]
    found = {f.check: f for f in result.findings if f.model == MODEL}
    assert found["detection"].verdict == found["re-run"].verdict == "agrees"
    assert found["detection"].count == 10 + 5  # all clean images, and the stored examples
    with zipfile.ZipFile(bundle) as archive:
        manifest = json.loads(archive.read("manifest.json"))
    assert manifest["detectors"] == {MODEL: sha256_file(zoo / MODEL / "weights.safetensors")}
    assert 0 < sum(load_run(original).cells[0].rows["clean_score"] > 0.32) < 10


def test_a_detector_that_is_not_at_hand_leaves_its_cells_unchecked(original: Path, tmp_path: Path) -> None:
    result = checked(bundled(original, tmp_path / "bundle.zip"))
    unchecked = {f.model for f in result.of("unchecked") if f.check == "model"}
    assert MODEL in unchecked
    assert result.exit_code == 3


def _forge_score(rows: pd.DataFrame) -> None:
    """A stored attacked image that was accepted and wrong is said to be flagged, with all that follows."""
    at = rows.index[rows["example"].notna() & (rows["clean_margin"] > 0) & ~rows["robust"]][0]
    rows.loc[at, "score"] = 1.0
    rows.loc[at, "margin"] = np.float32(1.0 - 0.32)
    rows.loc[at, ["robust", "broken_at"]] = True, -1
    rows.loc[at, "broken_by"] = None


def _forge_clean(rows: pd.DataFrame) -> None:
    at = rows.index[rows["clean_score"] < 0.3][0]
    rows.loc[at, "clean_score"] += 0.01
    margin = min(rows.loc[at, "clean_classifier_margin"], 0.32 - rows.loc[at, "clean_score"])
    rows.loc[at, "clean_margin"] = np.float32(margin)


def _forge_noisy(rows: pd.DataFrame) -> None:
    rows.loc[0, "noisy_score"] = rows.loc[0, "noisy_score"] + 0.05


def _forge_noisy_verdict(rows: pd.DataFrame) -> None:
    rows.loc[0, "noisy_classifier_margin"] += 1.0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_forge_score, "values of score"),
        (_forge_clean, "values of clean_score"),
        (_forge_noisy, "values of noisy_score"),
        (_forge_noisy_verdict, "noisy margins"),
    ],
)
def test_forged_columns_are_found(
    forgery: Forgery, zoo: Path, change: Callable[[pd.DataFrame], None], said: str
) -> None:
    result = checked(forgery.edit(MODEL, ATTACK, change).bundle(), zoo=zoo)
    assert "rows" not in differing(result)  # nothing in the bundle contradicts it
    assert "detection" in differing(result)
    assert said in reason(result, "detection")


def _contradict(rows: pd.DataFrame) -> None:
    rows.loc[0, "score"] = rows.loc[0, "score"] + 5


def test_scores_that_contradict_margins_are_found_without_a_detector(forgery: Forgery) -> None:
    result = checked(forgery.edit(MODEL, ATTACK, _contradict).bundle(), files_only=True)
    assert "margin contradicts the scores" in reason(result, "rows")


@pytest.mark.parametrize("part", ["threshold", "noise_std", "sha256"])
def test_a_forged_threshold_or_noise_is_found(forgery: Forgery, part: str) -> None:
    guard = forgery.record(MODEL, ATTACK).detector
    assert guard is not None
    value: Any = "a" * 64 if part == "sha256" else 0.4
    forgery.change_record(MODEL, ATTACK, detector=guard.model_copy(update={part: value}))
    if part == "sha256":
        from robbench.core.errors import UserError

        with pytest.raises(UserError, match=r"has detector tiny-mean with weights aaaaaaaaaaaa"):
            checked(forgery.bundle(), files_only=True)
        return
    assert "detector" in reason(checked(forgery.bundle(), files_only=True), "rows")


def test_a_threshold_forged_in_card_and_record_is_another_detector(
    original: Path, zoo: Path, tmp_path: Path
) -> None:
    """The whole run made with a detector that flags more, and offered under the same name."""
    other = Path(shutil.copytree(zoo, tmp_path / "zoo"))
    write_detector(other, "mean", 0.2)
    run = attacked(tmp_path / "run", (MODEL,), (ATTACK,), "--zoo", str(other))
    result = checked(bundled(run, tmp_path / "bundle.zip"), zoo=zoo)
    assert "model" in differing(result)
    assert "guarded by another detector" in reason(result, "model")


def test_other_noise_in_the_card_changes_what_is_scored(original: Path, zoo: Path, tmp_path: Path) -> None:
    """Noise is no part of the detector's function, and yet of its cells."""
    other = Path(shutil.copytree(zoo, tmp_path / "zoo"))
    card = read_detector(other / MODEL).card
    attack = card.attacks[0].model_copy(update={"noise_std": 0.5})
    (other / MODEL / "card.yaml").write_text(dump_yaml(card.model_copy(update={"attacks": (attack,)})))
    result = checked(bundled(original, tmp_path / "bundle.zip"), zoo=other)
    assert "not those of the card here" in reason(result, "detection")


def test_export_keeps_the_columns_and_a_merge_the_cells(original: Path, zoo: Path, tmp_path: Path) -> None:
    from robbench.bundle.archive import open_bundle

    with open_bundle(bundled(original, tmp_path / "bundle.zip")) as bundle:
        cell, before = bundle.run.cells[0], load_run(original).cells[0]
        assert cell.cell.detector == before.cell.detector
        assert cell.rows["score"].equals(before.rows["score"])
        assert bundle.run.cards[MODEL].detector is not None
