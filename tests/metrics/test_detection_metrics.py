"""Detection metrics against scikit-learn, the reconstruction from the papers' tables, and definitions by hand."""

import numpy as np
import pytest
from detection_rows import THRESHOLD, guarded_cell, guarded_rows, random_cell
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import auc, average_precision_score, roc_auc_score, roc_curve

from robbench.metrics import all_metrics
from robbench.metrics.detection import DETECTION_METRICS, scored
from robbench.metrics.registry import Number
from robbench.statistics import roc
from robbench.statistics.accuracy import wilson
from robbench.statistics.roc import Scored, separation
from robbench.store.records import CellResult

NAMES = [metric.name for metric in DETECTION_METRICS]


def numbers(result: CellResult) -> dict[str, Number | None]:
    return {
        metric.name: metric.compute(result)
        for metric in all_metrics()
        if metric.compute is not None and metric.fits(result.cell) and metric.name in (*NAMES, "accuracy")
    }


def values(result: CellResult) -> dict[str, float | None]:
    return {name: number.value if number else None for name, number in numbers(result).items()}


@pytest.mark.parametrize("floor", [11, 16])
def test_floors_of_the_published_tables(floor: int) -> None:
    """An attack on 100 images that reaches one class on all of them, of which `floor` have that label, and a detector
    that flags nothing: ACC-COM 11.0 (MNIST) and 16.0 (CIFAR-10)."""
    still = np.arange(100) < floor
    result = guarded_cell(guarded_rows((np.zeros(100),) * 3, (np.ones(100, bool), still)))
    found = values(result)
    assert found["acc_com"] == found["bare_accuracy"] == found["accuracy"] == floor
    assert found["acc_nadv"] == 100


def test_a_detector_that_flags_everything() -> None:
    result = guarded_cell(guarded_rows((np.ones(50),) * 3, (np.ones(50, bool), np.zeros(50, bool))))
    found = values(result)
    assert (found["accuracy"], found["acc_com"], found["acc_nadv"]) == (0, 100, 0)
    assert found["accepted_accuracy_clean"] is found["accepted_accuracy_attacked"] is None
    assert found["auroc"] == 50  # everything ties


def test_natural_and_noisy_images_count_half_each_and_the_interval_is_of_so_many_images() -> None:
    """100 images: ACC-NADV moves in steps of 0.5, as in the papers' tables."""
    flagged = np.where(np.arange(100) < 3, 1.0, 0.0)
    result = guarded_cell(guarded_rows((flagged, np.zeros(100), np.zeros(100)), (np.ones(100, bool),) * 2))
    number = numbers(result)["acc_nadv"]
    assert number is not None
    assert number.value == 98.5
    one = wilson(98.5, 100)
    assert (number.lower, number.upper) == (one.lower, one.upper)
    assert numbers(result)["auroc"] is None  # nobody was fooled


def test_a_score_that_is_no_number_is_accepted() -> None:
    nothing = np.full(10, np.nan)
    found = values(guarded_cell(guarded_rows((nothing,) * 3, (np.ones(10, bool), np.zeros(10, bool)))))
    assert (found["acc_nadv"], found["acc_com"], found["auroc"]) == (100, 0, 50)


def test_shares_by_hand() -> None:
    rows = guarded_rows(
        ([0, 0, 1, 0], [0, 1, 1, 0], [1, 0, 0, 0]),
        (np.array([True, True, True, False]), np.array([False, False, True, False])),
    )
    found = values(guarded_cell(rows))
    assert found["acc_nadv"] == 100 * 5 / 8
    assert found["acc_com"] == 50  # one flagged, one right
    assert found["accuracy"] == 25  # of these the first alone was right and accepted before
    assert found["bare_accuracy"] == 25
    assert found["accepted_accuracy_clean"] == pytest.approx(100 * 2 / 3)
    assert found["accepted_accuracy_attacked"] == pytest.approx(100 / 3)


@given(st.integers(0, 10_000), st.integers(5, 60), st.integers(1, 4))
@settings(max_examples=50)
def test_summaries_are_scikit_learns(seed: int, n: int, distinct: int) -> None:
    """With many ties, and infinite scores."""
    rng = np.random.default_rng(seed)
    scores = rng.integers(-distinct, distinct + 1, n).astype(float)
    scores[rng.random(n) < 0.1] = np.inf
    attacked = rng.random(n) < 0.4
    if attacked.all() or not attacked.any():
        return
    found = separation(Scored(scores, attacked, np.arange(n)), seed=0, resamples=5)
    finite = np.where(np.isinf(scores), 1e6, scores)
    x, y, _ = roc_curve(attacked, finite, drop_intermediate=False)
    assert found is not None
    assert found.auroc.value == pytest.approx(100 * roc_auc_score(attacked, finite))
    assert found.aupr.value == pytest.approx(100 * average_precision_score(attacked, finite))
    assert found.tpr.value == pytest.approx(100 * y[x <= 0.05].max())
    curve = roc.roc_curve(Scored(scores, attacked, np.arange(n)))
    assert curve is not None
    area = auc(curve.false_positives, curve.true_positives)
    assert area == pytest.approx(roc_auc_score(attacked, finite))
    corners = set(zip(x.round(9), y.round(9), strict=True))
    assert {*zip(curve.false_positives.round(9), curve.true_positives.round(9), strict=True)} <= corners


def test_intervals_are_a_bootstrap_over_samples() -> None:
    """Against one that draws samples with all their images, by scikit-learn."""
    images = scored(random_cell(80, 3))
    found = separation(images, seed=1, resamples=1000)
    assert found is not None
    rng, drawn = np.random.default_rng(5), []
    for _ in range(400):
        chosen = np.concatenate([np.flatnonzero(images.samples == i) for i in rng.integers(0, 80, 80)])
        drawn.append(100 * roc_auc_score(images.attacked[chosen], images.scores[chosen]))
    lower, upper = np.percentile(drawn, [2.5, 97.5])
    assert found.auroc.lower == pytest.approx(lower, abs=1.5)
    assert found.auroc.upper == pytest.approx(upper, abs=1.5)
    assert separation(images, seed=1) == separation(images, seed=1)
    for one in (found.auroc, found.aupr, found.tpr):
        assert one.lower <= one.value <= one.upper


def test_positives_are_images_that_fool_the_classifier_alone() -> None:
    result = random_cell(60, 4)
    rows = result.rows
    fooled = (rows["clean_classifier_margin"] > 0) & ~(rows["classifier_margin"] > 0)
    images = scored(result)
    assert images.attacked.sum() == fooled.sum()
    assert (~images.attacked).sum() == 120
    number = numbers(result)["auroc"]
    assert number is not None
    assert number.scope.startswith(f"{fooled.sum()} attacked images that fool the classifier")


def test_only_guarded_classifiers_have_them_and_all_that_classifiers_have() -> None:
    guarded = random_cell(20, 0).cell
    plain = guarded.model_copy(update={"detector": None})
    for metric in all_metrics():
        if metric.name in NAMES:
            assert metric.fits(guarded)
            assert not metric.fits(plain)
        else:
            assert metric.fits(guarded) == metric.fits(plain)
    assert guarded.detector is not None
    assert guarded.detector.threshold == THRESHOLD
