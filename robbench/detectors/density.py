"""Kernel density in a layer: `kde` (Feinman et al. 2017) and the ER-Detector `er` (Li et al. 2021)."""

import math
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from robbench.cards import Positive
from robbench.core.errors import UserError
from robbench.detectors.base import DETECTORS, Detector, DetectorParameters, Reference

# Tuned by the authors for their networks and their images in [-.5,.5] (`lid_adversarial_subspace_detection`).
PUBLISHED = {"mnist": 3.7926, "cifar10": 0.26, "svhn": 1.0}
FOLDS = 5
CV_POINTS = 500  # points of a class at most on which a bandwidth is chosen
FACTORS = np.logspace(-1.5, 0.5, 21)  # bandwidths that are tried, in standard deviations of the class

Bandwidth = float | Literal["cv"]


class KdeParameters(DetectorParameters):
    """bandwidth: of the Gaussian kernels; "cv": by cross-validated likelihood, one a class; "published"."""

    bandwidth: Literal["cv", "published"] | Positive = "cv"


class ErParameters(DetectorParameters):
    """sigma: of the kernel exp(-|z|^2 / sigma^2), so that the bandwidth is sigma / sqrt(2); "cv" as of `kde`."""

    sigma: Literal["cv"] | Positive = "cv"


class Er1Parameters(ErParameters):
    """sigma: by cross-validated likelihood, one a class."""

    sigma: Literal["cv"] = "cv"


class Er2Parameters(ErParameters):
    """sigma: 1, the deviation of the Gaussian prior."""

    sigma: float = Field(default=1.0, ge=1, le=1)


@DETECTORS.register("kde")
class KernelDensity(Detector):
    """Log density of the last hidden layer under a Gaussian kernel density of the training images of the predicted
    class (KD of Feinman et al. 2017, as re-released with LID)."""

    Parameters: ClassVar[type[DetectorParameters]] = KdeParameters

    def bandwidth(self, dataset: str) -> Bandwidth:
        """The bandwidth of all classes, or "cv"."""
        given: Bandwidth | Literal["published"] = self.parameters.bandwidth
        if given != "published":
            return given
        if dataset not in PUBLISHED:
            raise UserError(
                f"detector {self.name!r}, --set bandwidth=published: there is one for {', '.join(PUBLISHED)} and none "
                f"for {dataset!r}; give a number, or cv"
            )
        return PUBLISHED[dataset]

    def learn(self, reference: Reference) -> None:
        chosen = self.bandwidth(reference.dataset)
        _require_samples(self.name, reference, FOLDS if chosen == "cv" else 2)
        self.keep("labels", reference.labels.cpu())
        for place, points in enumerate(self.rows_of(reference.images)):
            self.keep(f"points_{place}", points)
            classes = (points[reference.labels == label] for label in range(reference.classes))
            widths = [self._width(rows, label, place, chosen) for label, rows in enumerate(classes)]
            self.keep(f"bandwidths_{place}", torch.tensor(widths, dtype=torch.float64))

    def _width(self, rows: Tensor, label: int, place: int, chosen: Bandwidth) -> float:
        if float((rows.amax(0) - rows.amin(0)).max()) == 0:
            raise UserError(
                f"detector {self.name!r}: layer {self.layers[place]!r} gives the same features for all images of class "
                f"{label}, which have no density; name another --layer"
            )
        return choose_bandwidth(rows) if chosen == "cv" else chosen

    def statistic(self, place: int, features: Tensor, predicted: Tensor) -> Tensor:
        """Negative log density, in nats."""
        points, labels = self.held(f"points_{place}"), self.held("labels")
        widths, found = self.held(f"bandwidths_{place}"), features.new_zeros(len(features))
        for label in sorted(set(predicted.tolist())):
            rows = (predicted == label).nonzero().squeeze(1)
            density = log_density(features[rows], points[labels == label], float(widths[label]))
            found = found.index_copy(0, rows, -density)
        return found


@DETECTORS.register("er")
class ErDetector(KernelDensity):
    """`kde` on the embedding E(x) of a classifier with an encoder (Algorithm 1 of the supplement of ER-Classifier): the
    output of its module `encoder`, or of the one named with --layer."""

    Parameters: ClassVar[type[DetectorParameters]] = ErParameters

    @classmethod
    def default_layers(cls, classifier: nn.Module, images: Tensor) -> tuple[str, ...]:
        found = [name for name, _ in classifier.named_modules() if name.split(".")[-1] == "encoder"]
        if len(found) != 1:
            raise UserError(
                "the classifier has no module called encoder whose output is its embedding; name the embedding with "
                "--layer, as in --layer fc1"
            )
        return (found[0],)

    def bandwidth(self, dataset: str) -> Bandwidth:
        sigma: Bandwidth = self.parameters.sigma
        return sigma if sigma == "cv" else sigma / math.sqrt(2)


@DETECTORS.register("er1")
class Er1(ErDetector):
    """`er` with sigma by cross-validated likelihood. A configuration of robbench's: the paper defines no ER1."""

    Parameters: ClassVar[type[DetectorParameters]] = Er1Parameters


@DETECTORS.register("er2")
class Er2(ErDetector):
    """`er` with sigma 1. A configuration of robbench's: the paper defines no ER2."""

    Parameters: ClassVar[type[DetectorParameters]] = Er2Parameters


def log_density(z: Tensor, points: Tensor, bandwidth: float) -> Tensor:
    """Log density [N], in nats, of z [N,D] under Gaussian kernels at points [M,D]; float64, differentiable in z."""
    size = points.shape[1]
    # Distances of differences: |z|^2 - 2 z.p + |p|^2 would lose the small ones.
    squared = torch.cdist(z, points, compute_mode="donot_use_mm_for_euclid_dist").square()
    constant = math.log(len(points)) + size * math.log(bandwidth * math.sqrt(2 * math.pi))
    return (-squared / (2 * bandwidth**2)).logsumexp(1) - constant


def choose_bandwidth(points: Tensor) -> float:
    """The bandwidth of the largest cross-validated likelihood of points [M,D], of those in `FACTORS`."""
    from sklearn.model_selection import KFold
    from sklearn.neighbors import KernelDensity as Kde

    rows = points[:: math.ceil(len(points) / CV_POINTS)].numpy()
    tried = float(points.var(0).mean().sqrt()) * FACTORS
    folds = list(KFold(FOLDS).split(rows))  # not GridSearchCV, whose bookkeeping takes most of its time here
    held_out = [
        sum(Kde(bandwidth=width).fit(rows[known]).score(rows[test]) for known, test in folds)
        for width in tried
    ]
    return float(tried[int(np.argmax(held_out))])


def _require_samples(name: str, reference: Reference, least: int) -> None:
    counts = torch.bincount(reference.labels, minlength=reference.classes)
    label = int(counts.argmin())
    if int(counts[label]) < least:
        raise UserError(
            f"detector {name!r}: class {label} has {int(counts[label])} of the {len(reference.labels)} clean training "
            f"images and its density needs {least}; use more with --set reference=N, or a data set that has them"
        )
