"""Data sets by name: built-in ones, those of plugins, and a user's own folder."""

from pathlib import Path

from robbench.core.errors import unknown_name
from robbench.core.foreign import foreign_code
from robbench.core.resources import dataset_root
from robbench.data import digits, imagenet, vision  # noqa: F401  (they register themselves)
from robbench.data.base import DATASETS, Dataset
from robbench.data.card import UNKNOWN_STEP, require_dataset
from robbench.data.folder import load_folder
from robbench.data.names import BUILT_IN, dataset_names
from robbench.data.overlap import with_overlap_noted


def load_dataset(name: str, data_dir: str | Path | None = None, data: str | Path | None = None) -> Dataset:
    """The data set called `name`. data_dir: folder of torchvision-style files (`--data-dir`, ROBBENCH_DATA); data: the
    folder of a data set of one's own (`--data`), whose card must have this name, or be like it.

    Raises `UserError` for an unknown name, for files that are absent and cannot be downloaded, and for malformed ones.
    """
    if data is not None:
        require_dataset(name, Path(data))
        return load_folder(Path(data), data_dir)
    if name not in DATASETS:  # also knows what was registered at run time
        raise unknown_name("data set", name, dataset_names(), UNKNOWN_STEP)
    load, root = DATASETS.get(name), dataset_root(data_dir)
    step = "put whole files there again, or name another folder with --data-dir or ROBBENCH_DATA"
    with foreign_code(f"reading data set {name!r} from {str(root)!r}", step):  # empty and cut files, plugins
        dataset = load(root)
    return dataset if name in BUILT_IN else with_overlap_noted(dataset)
