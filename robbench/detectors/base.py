"""The contract of a detector: a score per image that says how suspicious it is, and a threshold.

A subclass turns the features of a layer into one number per image (`statistic`); a logistic regression on these
numbers, one a layer, is the score. It is fitted on clean and noisy images against adversarial ones
(`detectors.training`).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from robbench.core.errors import UserError
from robbench.core.registry import Registry
from robbench.core.schema import Strict, validate
from robbench.detectors.features import Maps, last_hidden_layer, read_layers

AT_ONCE = 200  # images a forward, where nothing else is said
CONSTANT = 1e-12  # spread of a statistic, relative to its size, below which it is constant


class DetectorParameters(Strict):
    """Parameters of every detector. reference: clean training images that say what is ordinary, drawn with equal class
    shares; all where there are fewer."""

    reference: int = Field(default=10_000, ge=1)


@dataclass(frozen=True)
class Reference:
    """Clean training images [N,C,H,W] in [0,1], true labels [N], number of classes, name of their data set."""

    images: Tensor
    labels: Tensor
    classes: int
    dataset: str


class Detector(nn.Module, ABC):
    """Base of all detectors. Subclasses set `Parameters` and implement `learn` and `statistic`.

    Attributes:
        name: in the registry.
        classifier: maps images [N,C,H,W] in [0,1] to logits [N,K]; frozen, in eval mode.
        layers: where the features come from.
        parameters: a `Parameters`.
        threshold: larger scores are flagged; infinite until it is fixed.
    """

    Parameters: ClassVar[type[DetectorParameters]] = DetectorParameters

    def __init__(
        self, name: str, classifier: nn.Module, layers: Sequence[str], parameters: Mapping[str, Any]
    ) -> None:
        super().__init__()
        self.name, self.classifier, self.layers = name, classifier, tuple(layers)
        self.parameters: Any = validate(dict(parameters), self.Parameters, f"detector {name!r}, --set")
        self.threshold = math.inf
        self.eval()

    @classmethod
    def default_layers(cls, classifier: nn.Module, images: Tensor) -> tuple[str, ...]:
        """The layers without --layer: the last hidden one. images: two or more to try the classifier on."""
        return (last_hidden_layer(classifier, images),)

    @property
    def pointwise(self) -> bool:
        """Whether a score depends on its image alone, as adaptive attacks and thresholds require."""
        return True

    @property
    def at_once(self) -> int:
        """Images a forward in `scores_of` and `evidence_of`."""
        return AT_ONCE

    @property
    def maps(self) -> Maps:
        """Whether features of convolutions are flattened or averaged over places."""
        return "flatten"

    @abstractmethod
    def learn(self, reference: Reference) -> None:
        """`keep` what the statistic needs of clean training images."""

    @abstractmethod
    def statistic(self, place: int, features: Tensor, predicted: Tensor) -> Tensor:
        """One number an image, float64 [N], differentiable in the features [N,D] of `layers[place]`. predicted: classes
        [N] of the images."""

    def chosen(self, right: Tensor, broken: Tensor) -> Tensor:
        """Positions of the attacked images that train the score. right, broken: [N] bool, whether the clean image is
        classified correctly and the attacked one is not."""
        return (right & broken).nonzero().squeeze(1)

    def scored_together(self, rows: Tensor) -> Tensor:
        """Those of the positions `rows` whose images can be scored in one call, which are all where `pointwise`."""
        return rows

    def scaling(self, fitted: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
        """Centre and scale [F] by which the regression sees statistics [N,F]; `others`, of clean images of the
        threshold, are not looked at without quirks."""
        from sklearn.preprocessing import StandardScaler

        scaler = StandardScaler().fit(fitted.numpy())
        return torch.from_numpy(scaler.mean_), torch.from_numpy(scaler.scale_)

    def features(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """Features [N,D] a layer, float64, and predicted classes [N]."""
        rows, logits = read_layers(self.classifier, self.layers, images, self.maps)
        return rows, logits.argmax(1)

    def evidence(self, images: Tensor, clean: Tensor | None = None) -> Tensor:
        """Statistics [N,F], one a layer. clean: what the images were before they were changed, which only detectors
        that are not `pointwise` look at."""
        rows, predicted = self.features(images)
        return torch.stack([self.statistic(i, row, predicted) for i, row in enumerate(rows)], 1)

    def scores(self, images: Tensor, clean: Tensor | None = None) -> Tensor:
        """How suspicious images [N,C,H,W] in [0,1] are: float64 [N], larger = more; log-odds of being adversarial,
        differentiable in the images."""
        scaled = (self.evidence(images, clean) - self.held("center")) / self.held("scale")
        return scaled @ self.held("coefficients") + self.held("intercept")

    def flags(self, scores: Tensor) -> Tensor:
        """Whether images of these scores are flagged, [N] bool; a score that is no number counts as accepted, so that
        no image passes for detected by breaking the detector."""
        return scores > self.threshold

    def rows_of(self, images: Tensor) -> list[Tensor]:
        """`features` of many images, without a graph, on the CPU: [N,D] a layer."""
        with torch.no_grad():
            parts = [self.features(part)[0] for part, _ in self._batches(images, None)]
        return [torch.cat([part[place].cpu() for part in parts]) for place in range(len(self.layers))]

    def evidence_of(self, images: Tensor, clean: Tensor | None = None) -> Tensor:
        """`evidence` of many images, without a graph, on the CPU; `UserError` where it is not finite."""
        with torch.no_grad():
            found = torch.cat([self.evidence(*pair).cpu() for pair in self._batches(images, clean)])
        if not bool(found.isfinite().all()):
            raise UserError(
                f"detector {self.name!r}: a statistic of layer {','.join(self.layers)} is not finite; "
                f"name another --layer"
            )
        return found

    def scores_of(self, images: Tensor, clean: Tensor | None = None) -> Tensor:
        """`scores` of many images, without a graph, on the CPU."""
        with torch.no_grad():
            return torch.cat([self.scores(*pair).cpu() for pair in self._batches(images, clean)])

    def _batches(self, images: Tensor, clean: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Images and what they were before they were changed, in batches on the classifier's device."""
        held = next(self.classifier.parameters(), images)
        for rows in torch.split(torch.arange(len(images)), self.at_once):
            before = None if clean is None else clean[rows].to(held.device)
            yield images[rows].to(held.device), before

    def fit_scores(self, negatives: Tensor, positives: Tensor, others: Tensor | None = None) -> None:
        """Fit the logistic regression on statistics [N,F] of clean and noisy (negatives) and adversarial images.

        others: see `scaling`. `UserError` where a statistic is constant.
        """
        from sklearn.linear_model import LogisticRegression

        fitted = torch.cat([negatives, positives])
        self._require_spread(fitted)
        center, scale = self.scaling(fitted, fitted[:0] if others is None else others)
        adversarial = torch.arange(len(fitted)) >= len(negatives)
        regression = LogisticRegression(max_iter=1000).fit(
            ((fitted - center) / scale).numpy(), adversarial.numpy()
        )
        self.keep("center", center)
        self.keep("scale", scale)
        self.keep("coefficients", torch.from_numpy(regression.coef_[0]))
        self.keep("intercept", torch.tensor(float(regression.intercept_[0]), dtype=torch.float64))

    def _require_spread(self, statistics: Tensor) -> None:
        spread = statistics.amax(0) - statistics.amin(0)
        for place, layer in enumerate(self.layers):
            if not float(spread[place]) > CONSTANT * float(statistics[:, place].abs().max()):
                raise UserError(
                    f"detector {self.name!r}: layer {layer!r} gives the same number for every image; "
                    f"name another --layer"
                )

    def fix_threshold(self, scores: Tensor, false_positive_rate: float) -> float:
        """Set the threshold so that at most that share of clean images with these scores [N] is flagged; returns the
        share that is. Halfway between two scores, so that rounding in another batch flags no other image."""
        allowed = math.floor(false_positive_rate * len(scores) + 1e-9)
        ordered = scores.sort().values
        accepted = len(scores) - 1 - allowed
        self.threshold = float(ordered[accepted : accepted + 2].mean())
        return float(self.flags(scores).double().mean())

    def keep(self, name: str, value: Tensor) -> None:
        """Keep a tensor that scores need; it is moved with the detector and written to its file."""
        self.register_buffer(name, value.detach().contiguous())

    def held(self, name: str) -> Tensor:
        """A tensor that `keep` was called with."""
        return self.get_buffer(name)

    def state(self) -> dict[str, Tensor]:
        """Every tensor that was kept, by name, on the CPU; the classifier's are not among them."""
        return {name: value.cpu().clone() for name, value in self.named_buffers(recurse=False)}


def _is_detector(entry: object) -> bool:
    return isinstance(entry, type) and issubclass(entry, Detector)


DETECTORS: Registry[type[Detector]] = Registry(
    "detector", "robbench.detectors", _is_detector, "a subclass of robbench.detectors.base.Detector"
)
