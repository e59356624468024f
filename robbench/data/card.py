"""Cards of data sets: what every data set says of itself, and the card.yaml of a folder of one's own. No torch here."""

from pathlib import Path, PurePosixPath
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from robbench.cards import LogitIndices, Side
from robbench.core.errors import UserError, unknown_name
from robbench.core.schema import Strict, load_yaml
from robbench.data.names import dataset_names
from robbench.specs import SHA256, Name

CARD_FILE = "card.yaml"
UNKNOWN_STEP = "or give the path of a folder of your own"
SplitName = Literal["train", "validation", "test"]
Layout = Literal["NHW", "NHWC", "NCHW"]


class SplitCard(Strict):
    """n: images. sha256: over name, shape, grey levels, ids, labels and pixels of the split."""

    n: int = Field(ge=0)
    sha256: SHA256


class DatasetCard(Strict):
    """A data set as it was at hand.

    Attributes:
        name, source, license, note: for people.
        folder: name of the folder of --data; "" for a named data set.
        like: the data set whose models and budgets fit.
        shape: (C,H,W).
        grey_levels: pixels are 0..grey_levels-1.
        class_names: by label.
        classes: see `FolderCard`.
        splits: those that have images; test is what is measured.
    """

    name: str
    source: str = ""
    license: str = ""
    note: str = ""
    folder: str = ""
    like: str | None = None
    shape: tuple[Side, Side, Side]
    grey_levels: int = Field(ge=2)
    class_names: tuple[str, ...]
    classes: LogitIndices | None = None
    splits: dict[SplitName, SplitCard]


class SplitFiles(Strict):
    """Where a split lies, relative to the card: an npz file, or a folder of class folders. sha256: of the file's bytes;
    of a folder, see `robbench.data.images.folder_sha256`."""

    file: str | None = None
    folder: str | None = None
    sha256: SHA256

    @field_validator("file", "folder")
    @classmethod
    def _inside(cls, value: str | None) -> str | None:
        path = PurePosixPath(value or "x")
        if path.is_absolute() or ".." in path.parts:
            raise ValueError("give a path below the folder of the card")
        return value

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.file is None) == (self.folder is None):
            raise ValueError("give `file` (npz arrays) or `folder` (images), one of the two")
        return self


class Resize(Strict):
    """The shorter side becomes `shorter` pixels, and the centre is cut out. filter: of Pillow."""

    shorter: Annotated[Side, Field(le=10_000)]
    filter: Literal["lanczos", "bilinear", "bicubic"] = "lanczos"


class ImageFolders(Strict):
    """How image files are read.

    Attributes:
        size: (height, width) that every image has, where `resize` is given after it.
        channels: 1 (grey) or 3 (RGB).
        resize: how images are brought to that size; None where they have it.
        any_mode: whether palettes, transparency, CMYK and 16 bits are converted as Pillow does it, not refused.
    """

    size: tuple[Side, Side]
    channels: Literal[1, 3] = 3
    resize: Resize | None = None
    any_mode: bool = False

    @model_validator(mode="after")
    def _large_enough(self) -> Self:
        if self.resize is not None and self.resize.shorter < max(self.size):
            raise ValueError(
                "resize.shorter is less than a side of size: the rest would be filled with black"
            )
        return self


class FolderCard(Strict):
    """card.yaml of a data set of one's own (`--data FOLDER`).

    Attributes:
        schema_version: of the card.
        name, class_names, source, license, note: as in `DatasetCard`.
        grey_levels: pixels are 0..grey_levels-1.
        normalisation: none; models bring their own.
        layout: of x in the npz files.
        image_folder: instead of it, for images in class folders.
        splits: where each lies.
        like: a data set whose models, budgets and recipes fit this one.
        corruptions: folder with CORRUPTION.npy of the test images, as CIFAR-10-C is published.
        classes: which logit of a model each class is, for data of some of a model's classes (`ModelCard.logits`).
        root: where the files are, of a card that does not lie with them.
    """

    schema_version: Literal[1] = 1
    name: Name
    class_names: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=2)]
    grey_levels: int = Field(default=256, ge=2, le=256)
    normalisation: Literal["none"] = "none"
    layout: Layout | None = None
    image_folder: ImageFolders | None = None
    splits: dict[SplitName, SplitFiles]
    like: str | None = None
    corruptions: str | None = None
    classes: LogitIndices | None = None
    root: str | None = None
    source: str = ""
    license: str = ""
    note: str = ""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len(set(self.class_names)) < len(self.class_names):
            raise ValueError("class_names repeats a name")
        if self.classes is not None and len(self.classes) != len(self.class_names):
            raise ValueError(
                f"classes has {len(self.classes)} logits and class_names {len(self.class_names)} names; "
                f"give one logit a class"
            )
        if "test" not in self.splits:
            raise ValueError("splits has no `test`, which is what is measured")
        if "validation" in self.splits and "train" not in self.splits:
            raise ValueError(
                "splits has `validation` and no `train`; name the latter, or leave the former out"
            )
        folders = [split.folder is not None for split in self.splits.values()]
        if any(folders) != all(folders):
            raise ValueError("splits are npz files or image folders, not both")
        if all(folders) != (self.image_folder is not None):
            raise ValueError(
                "`image_folder` (size, channels) belongs to splits that are folders, and only to them"
            )
        if all(folders) != (self.layout is None):
            raise ValueError(
                "`layout` (NHW, NHWC or NCHW) belongs to splits that are npz files, and only to them"
            )
        if self.image_folder is not None and self.grey_levels != 256:
            raise ValueError("images have 256 grey levels; leave grey_levels out")
        return self

    @field_validator("like")
    @classmethod
    def _known(cls, value: str | None) -> str | None:
        if value is not None and value not in dataset_names():
            raise ValueError(f"{value!r} is no known data set (robbench list datasets)")
        return value


def read_folder_card(folder: Path) -> tuple[FolderCard, Path]:
    """The card of a data set folder (or of its card.yaml) and the folder; `UserError` for what is no such thing."""
    folder = folder.expanduser()
    path = folder if folder.name == CARD_FILE and folder.is_file() else folder / CARD_FILE
    if not path.is_file():
        found = "holds no card.yaml" if folder.is_dir() else "is not a folder"
        raise UserError(
            f"--data {str(folder)!r} {found}; give a folder with one (docs/data.md; robbench run --dataset writes it "
            f"for class folders of images)"
        )
    card = load_yaml(path, FolderCard)
    if card.name in dataset_names():
        raise UserError(
            f"{path}: key name: {card.name!r} is a data set that robbench knows; choose another name, and "
            f"`like: {card.name}` if its models fit"
        )
    return card, path.parent


def require_dataset(name: str, data: Path | None = None) -> None:
    """`UserError` unless `name` is a known data set, or that of the folder `data` (or the one it is like)."""
    if data is None:
        if name not in dataset_names():
            raise unknown_name("data set", name, dataset_names(), UNKNOWN_STEP)
        return
    card, _ = read_folder_card(data)
    if name not in (card.name, card.like):
        like = f", like {card.like}" if card.like else ""
        raise UserError(
            f"--data {str(data)!r} is the data set {card.name!r}{like}, and {name!r} is needed here; "
            f"name the folder of {name!r}, or leave --data out"
        )


def family(name: str, data: Path | None = None) -> str:
    """The data set whose budgets, recipes and models apply: what the card of `data` says it is like, else `name`."""
    return name if data is None else read_folder_card(data)[0].like or name
