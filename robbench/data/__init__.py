"""Data sets: scikit-learn's digits (embedded) and torchvision's."""

from robbench.data import digits, vision  # noqa: F401  (they register themselves)
from robbench.data.base import DATASETS, Dataset, Split, load_dataset, sample_ids, stratified_split
from robbench.data.names import dataset_names

__all__ = ["DATASETS", "Dataset", "Split", "dataset_names", "load_dataset", "sample_ids", "stratified_split"]
