"""ImageNet's validation images in torchvision's layout, resized and cut as in common evaluation."""

import re
from pathlib import Path

import torch

from robbench.core.errors import UserError
from robbench.data.base import DATASETS, Dataset
from robbench.data.card import ImageFolders, Resize
from robbench.data.images import (
    class_folders,
    folder_sha256,
    image_files,
    lossy_note,
    read_images,
    resize_note,
)
from robbench.data.names import BUILT_IN

CLASSES = 1000
# torchvision's own evaluation of its first weights: Resize(256), bilinear, CenterCrop(224), any mode to RGB.
HOW = ImageFolders(size=(224, 224), resize=Resize(shorter=256, filter="bilinear"), any_mode=True)


@DATASETS.register("imagenet")
def imagenet(root: Path) -> Dataset:
    """The images below ROOT/imagenet/val/WNID; there are no training images. They are decoded when they are drawn."""
    about = BUILT_IN["imagenet"]
    folder = root / about.files
    if not folder.is_dir():
        raise UserError(
            f"data set 'imagenet' is not in {str(root)!r} and cannot be downloaded; put the validation images there as "
            f"imagenet/val/n01440764/*.JPEG (a folder a wnid), or name their folder with --data-dir or ROBBENCH_DATA"
        )
    wnids = class_folders(folder)
    strange = [name for name in wnids if not re.fullmatch(r"n[0-9]{8}", name)]
    if strange or len(wnids) != CLASSES:
        found = (
            f"{strange[0]!r}, which is no wnid" if strange else f"{len(wnids)} class folders, not {CLASSES}"
        )
        raise UserError(
            f"{folder}: holds {found}; for some of its classes name the folder with --dataset, and their logits in its "
            f"card (docs/data.md)"
        )
    files = image_files(folder, wnids)
    test = read_images(files, HOW, folder_sha256(folder, files))
    few = f"{len(files):,} of the {about.test:,} validation images" if len(files) != about.test else ""
    notes = (few, "files not compared with published ones", lossy_note(files), resize_note(HOW))
    nothing = test.subset(torch.arange(0))
    return Dataset(
        "imagenet",
        tuple(wnids),
        256,
        nothing,
        nothing,
        test,
        source=about.source,
        license=about.license,
        note="; ".join(filter(None, notes)),
    )
