"""How well scores tell attacked images from others: ROC curves and their summaries, with bootstrap intervals."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from robbench.statistics.accuracy import CONFIDENCE, Estimate

Floats = NDArray[np.float64]
RESAMPLES = 1_000
FALSE_POSITIVES = 0.05  # rate at which the true positives are told
_AT_ONCE = 4_000_000  # numbers in memory a resample block


@dataclass(frozen=True)
class Scored:
    """Scores [m], larger for more suspicious; whether each is of an attacked image, bool [m]; number [m] of the sample
    that its image is a version of, from 0. A score that is NaN is the least suspicious."""

    scores: Floats
    attacked: NDArray[np.bool_]
    samples: NDArray[np.int64]


@dataclass(frozen=True)
class Curve:
    """Shares of others and of attacked images that are flagged, both [k] from 0 to 1, by falling threshold; images of
    one score are flagged together."""

    false_positives: Floats
    true_positives: Floats


@dataclass(frozen=True)
class Separation:
    """In percent: area under the ROC curve (ties count half), average precision, and the true positive rate at the last
    threshold that flags at most 5 % of the others."""

    auroc: Estimate
    aupr: Estimate
    tpr: Estimate


def roc_curve(scored: Scored) -> Curve | None:
    """The ROC curve, without points between two others on a line; None without attacked images or without others."""
    if not scored.attacked.any() or scored.attacked.all():
        return None
    flagged, false = _flagged(scored, np.ones((1, len(scored.scores))))
    x, y = false[0], flagged[0]
    straight = np.diff(x)[1:] * np.diff(y)[:-1] == np.diff(x)[:-1] * np.diff(y)[1:]
    kept = np.concatenate([[True], ~straight, [True]])
    return Curve(x[kept] / x[-1], y[kept] / y[-1])


def separation(scored: Scored, seed: int, resamples: int = RESAMPLES) -> Separation | None:
    """The summaries with intervals between the 2.5 and 97.5 percentiles over `resamples` bootstrap resamples of the
    samples, each with all versions of its image; None without attacked images or without others."""
    if not scored.attacked.any() or scored.attacked.all():
        return None
    found = _summaries(*_flagged(scored, np.ones((1, len(scored.scores)))))[0]
    drawn = np.concatenate([_summaries(*_flagged(scored, w)) for w in _draws(scored, seed, resamples)])
    tail = 100 * (1 - CONFIDENCE) / 2
    lower, upper = np.nanpercentile(drawn, [tail, 100 - tail], axis=0)
    count = int(scored.samples.max()) + 1
    return Separation(
        *(
            Estimate(float(v), float(low), float(up), count)
            for v, low, up in zip(found, lower, upper, strict=True)
        )
    )


def _draws(scored: Scored, seed: int, resamples: int) -> Iterator[Floats]:
    """How often each image is in a resample, [r,m] a block; without resamples that lack one of the two classes."""
    generator, count = np.random.default_rng(seed), int(scored.samples.max()) + 1
    size = max(1, _AT_ONCE // len(scored.scores))
    for start in range(0, resamples, size):
        rows = min(size, resamples - start)
        weights = generator.multinomial(count, np.full(count, 1 / count), size=rows)[:, scored.samples]
        both = weights[:, scored.attacked].any(1) & weights[:, ~scored.attacked].any(1)
        yield weights[both].astype(np.float64)


def _flagged(scored: Scored, weights: Floats) -> tuple[Floats, Floats]:
    """Weight [r,k] of the attacked images and of the others that are flagged, by falling threshold, from none to all;
    weights [r,m] of the images."""
    scores = np.where(np.isnan(scored.scores), -np.inf, scored.scores)
    order = np.argsort(-scores, kind="stable")
    ends = np.flatnonzero(np.append(scores[order][1:] != scores[order][:-1], True))
    parts = []
    for part in (scored.attacked, ~scored.attacked):
        summed = np.cumsum((weights * part)[:, order], axis=1)[:, ends]
        parts.append(np.concatenate([np.zeros((len(weights), 1)), summed], axis=1))
    return parts[0], parts[1]


def _summaries(flagged: Floats, false: Floats) -> Floats:
    """AUROC, average precision and true positive rate in percent, [r,3]; of counts as `_flagged` returns them."""
    attacked, others = flagged[:, -1], false[:, -1]
    caught, wrong = np.diff(flagged, axis=1), np.diff(false, axis=1)
    area = (wrong * (flagged[:, 1:] + flagged[:, :-1]) / 2).sum(1) / (attacked * others)
    both = np.maximum(flagged[:, 1:] + false[:, 1:], 1e-12)
    precision = (caught * flagged[:, 1:] / both).sum(1) / attacked
    allowed = false <= FALSE_POSITIVES * others[:, None] + 1e-9
    rate = np.where(allowed, flagged, 0.0).max(1) / attacked
    return 100 * np.stack([area, precision, rate], axis=1)
