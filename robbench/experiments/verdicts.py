"""Differences between the settings of a measured and a printed number, and whether the interval contains the print."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from robbench.experiments.published import PublishedRow

Verdict = Literal["within", "outside", "differs", "not compared", "not comparable", "not run", "failed"]
# Effect of a difference on a comparison: forbid it, leave it without a verdict, or only be named.
Effect = Literal["not comparable", "no verdict", "named"]

FIXED = 0.05  # percentage points that print and rounding of another machine may differ by


@dataclass(frozen=True)
class Difference:
    """A part of the setting in which print and measurement differ, both as texts."""

    what: str
    published: str
    measured: str
    effect: Effect = "no verdict"

    @property
    def text(self) -> str:
        """ "architecture conv3, published resnet18"."""
        return f"{self.what} {self.measured}, published {self.published}"


@dataclass(frozen=True)
class Setting:
    """Setting of a measurement. architecture: "" without a model. epsilon, eta: None without one."""

    dataset: str
    architecture: str = ""
    epsilon: float | None = None
    eta: float | None = None

    def apart_from(self, printed: PublishedRow) -> list[Difference | None]:
        """Differences in data set, architecture and budgets, any of which makes the numbers incomparable; None where
        both agree or the print does not state it."""
        trained = printed.defense and not printed.model
        pairs: tuple[tuple[str, object, object], ...] = (
            ("data set", printed.dataset or None, self.dataset),
            ("architecture", (printed.architecture or None) if trained else None, self.architecture),
            ("epsilon", printed.epsilon, self.epsilon),
            ("eta", printed.eta, self.eta),
        )
        return [difference(*pair, "not comparable") for pair in pairs]


def difference(
    what: str, published: object, measured: object, effect: Effect = "no verdict"
) -> Difference | None:
    """The difference; None where both agree, or the published value is None."""
    if published is None or published == measured or _close(published, measured):
        return None
    return Difference(what, _text(published), _text(measured), effect)


def sentence(differences: Iterable[Difference | None]) -> str:
    """The differences as one text; empty when there are none."""
    return "; ".join(found.text for found in differences if found is not None)


def _close(published: object, measured: object) -> bool:
    """Whether both are equal up to rounding; a flow ("cifar10-glow") equals its data set's name."""
    if isinstance(published, float) and isinstance(measured, float | int):
        return math.isclose(published, measured, rel_tol=1e-6, abs_tol=1e-12)
    if isinstance(published, list) and isinstance(measured, list | tuple):
        return sorted(map(str, published)) == sorted(str(part) for part in measured)
    return isinstance(published, str) and str(measured).startswith(f"{published}-")


def _text(value: object) -> str:
    if value is None or value == "":
        return "not known"
    if value in ([], ()):
        return "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return (
        f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)
    )


def widening(printed: PublishedRow) -> float:
    """Widening of the measured interval: half of the last printed digit, for percentages at most `FIXED`."""
    return min(printed.rounding, FIXED) if printed.unit == "%" else printed.rounding


def in_interval(reference: float, lower: float, upper: float, widened: float) -> Verdict:
    """Whether `reference` lies in [lower, upper], widened on both sides."""
    inside = lower - widened - 1e-9 <= reference <= upper + widened + 1e-9
    return "within" if inside else "outside"
