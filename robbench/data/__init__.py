"""Data sets: scikit-learn's digits (embedded), torchvision's, and folders of one's own.

Names are resolved when they are first used: `robbench.data.names` and `robbench.data.card` need no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from robbench.data.names import dataset_names

if TYPE_CHECKING:
    from robbench.data.base import DATASETS, Dataset, Split, sample_ids, stratified_split
    from robbench.data.loading import load_dataset

__all__ = ["DATASETS", "Dataset", "Split", "dataset_names", "load_dataset", "sample_ids", "stratified_split"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    loading = import_module(f"{__name__}.loading")  # also registers the built-in data sets
    return (
        loading.load_dataset if name == "load_dataset" else getattr(import_module(f"{__name__}.base"), name)
    )
