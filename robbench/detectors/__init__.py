"""Detectors of adversarial images: the contract (`base`), one module per family, training and loading."""

from robbench.detectors import density, lid, mahalanobis  # noqa: F401  (they register themselves)
from robbench.detectors.base import DETECTORS, Detector, DetectorParameters, Reference

__all__ = ["DETECTORS", "Detector", "DetectorParameters", "Reference"]
