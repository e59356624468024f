"""Models and test images by name, for Python: what `robbench run --model NAME --dataset NAME` would attack."""

from pathlib import Path

from torch import Tensor, nn

from robbench.core.errors import python_arguments
from robbench.data.base import sample_ids
from robbench.data.loading import load_dataset
from robbench.evaluation.request import require_seed
from robbench.models.flows.base import FrozenFlow
from robbench.models.loading import load_flow
from robbench.models.loading import load_model as load_entry
from robbench.models.zoo import find_model, zoo_entries

__all__ = ["load_images", "load_model"]


def load_model(name: str, checkpoints: str | Path | None = None) -> nn.Module | FrozenFlow:
    """The model called `name`: of the zoo, or the path of a card. Its weights are verified against the card's sha256.

    A classifier is a module in eval mode that maps images [N,C,H,W] in [0,1] to logits [N,K]; a flow is a
    `FrozenFlow`. checkpoints: folder with weights that cards name, as --checkpoints. `UserError` for an unknown name.
    """
    with python_arguments():
        entry = find_model(
            str(name), zoo_entries(None, Path(checkpoints) if checkpoints is not None else None)
        )
        return load_flow(entry) if entry.card.kind == "flow" else load_entry(entry).module


def load_images(
    dataset: str = "digits", n: int | None = None, seed: int = 0, data_dir: str | Path | None = None
) -> tuple[Tensor, Tensor]:
    """Test images [n,C,H,W], float32 in [0,1], and labels [n], int64, of a data set of `robbench list datasets`.

    n, seed: the random subset that `robbench run --n N --seed SEED` attacks; None for all images. data_dir: folder of
    the files, as --data-dir. `UserError` for an unknown name or absent files.
    """
    with python_arguments():
        split = load_dataset(dataset, data_dir).test
        return split.by_ids(sample_ids(split, n, require_seed(seed)))
