"""A run under generated corruptions: a verifier makes every image again, and refuses others."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from zoo_runs import KEPT, Forgery, attacked, bundled, checked, differing, reason

from robbench.data import load_dataset
from robbench.store.ledger import load_run

MODEL, FOG = "digits-standard", "g-fog-3"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return attacked(tmp_path_factory.mktemp("generated") / "run", [MODEL], [FOG, "g-jpeg_compression-5"])


def test_an_honest_bundle(run: Path) -> None:
    result = checked(bundled(run, run.parent / "honest.zip"), share=1.0)
    assert result.exit_code == 0
    counts = {(f.attack, f.check): f.count for f in result.findings}
    assert counts[FOG, "ball"] == counts["g-jpeg_compression-5", "ball"] == KEPT


def repainted(paint: Callable[[np.ndarray], np.ndarray]) -> Callable[[pd.DataFrame], None]:
    """Changes the first stored image, and states its true distances."""

    def edit(rows: pd.DataFrame) -> None:
        at = rows["example"].notna().idxmax()
        before = np.frombuffer(rows.loc[at, "example"], "<f4")
        image = paint(before.copy()).astype("<f4")
        rows.at[at, "example"] = image.tobytes()
        clean = load_dataset("digits").test.by_ids([int(rows.loc[at, "sample_id"])])[0].numpy().ravel()
        for name, order in (("l1", 1), ("l2", 2), ("linf", np.inf), ("l0", 0)):
            if name in rows:
                rows.at[at, name] = rows[name].dtype.type(np.linalg.norm(image.astype(float) - clean, order))

    return edit


def one_level(count: int) -> Callable[[np.ndarray], np.ndarray]:
    def paint(pixels: np.ndarray) -> np.ndarray:
        pixels[:count] += np.where(pixels[:count] < 0.5, 1, -1) / 255
        return pixels

    return paint


@pytest.mark.parametrize(
    "paint", [lambda p: p[::-1], one_level(64), one_level(2), lambda p: np.abs(p - 2 / 255)]
)
def test_another_image_is_refused(
    paint: Callable[[np.ndarray], np.ndarray], run: Path, tmp_path: Path
) -> None:
    result = checked(Forgery(run, tmp_path).edit(MODEL, FOG, repainted(paint)).bundle())
    assert result.exit_code == 1
    assert "ball" in differing(result)
    assert "1 images are not those that seed 0 generates" in reason(result, "ball")


def test_a_value_rounded_elsewhere_is_allowed(run: Path, tmp_path: Path) -> None:
    result = checked(Forgery(run, tmp_path).edit(MODEL, FOG, repainted(one_level(1))).bundle())
    assert "ball" not in differing(result)


def test_the_images_are_those_of_the_ids(run: Path) -> None:
    for result in load_run(run).cells:
        assert result.cell.attack.threat_model == "corruptions-generated"
        assert (result.rows["linf"] > 0).all()
