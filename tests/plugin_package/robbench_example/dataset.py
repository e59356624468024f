"""scikit-learn's digits, dark on light."""

from dataclasses import replace
from pathlib import Path

from robbench.data import Dataset, Split
from robbench.data.digits import digits


def digits_inverted(root: Path) -> Dataset:
    """The digits data set with every grey level g replaced by 16 - g."""
    source = digits(root)

    def inverted(split: Split) -> Split:
        return replace(split, images=split.levels - 1 - split.images)

    parts = {name: inverted(getattr(source, name)) for name in ("train", "validation", "test")}
    return replace(source, name="digits-inverted", **parts)
