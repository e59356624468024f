"""Writes data sets as users would: npz files or image folders, corrupted images, and the card."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import yaml

CLASSES = ["ant", "bee", "cat"]


def arrays(n: int, seed: int = 0, side: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """uint8 images [n,side,side,3] and int64 labels [n], every class in turn."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (n, side, side, 3), dtype=np.uint8), np.arange(n) % len(CLASSES)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_card(folder: Path, files: dict[str, Any], **changes: Any) -> Path:
    """card.yaml with `files` as its splits; a change of None leaves a key out."""
    content: dict[str, Any] = {
        "name": "insects",
        "class_names": CLASSES,
        "layout": "NHWC",
        "source": "made by the tests",
        "license": "MIT",
        "note": "random pixels",
        "splits": files,
    }
    content |= changes
    kept = {key: value for key, value in content.items() if value is not None}
    (folder / "card.yaml").write_text(yaml.safe_dump(kept, sort_keys=False), encoding="utf-8")
    return folder


def array_split(folder: Path, name: str, x: np.ndarray, y: np.ndarray) -> dict[str, str]:
    """Write NAME.npz; returns its entry in the card."""
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(folder / f"{name}.npz", x=x, y=y)
    return {"file": f"{name}.npz", "sha256": sha256(folder / f"{name}.npz")}


def array_folder(folder: Path, train: int = 60, test: int = 20, **changes: Any) -> Path:
    """A whole data set as npz files; train=0 leaves the training images out."""
    splits = {"train": array_split(folder, "train", *arrays(train, 1))} if train else {}
    return write_card(folder, {**splits, "test": array_split(folder, "test", *arrays(test, 2))}, **changes)


def tree_sha256(folder: Path) -> str:
    """The checksum of an image folder, by its definition: sha256 over the lines of sha256sum in path order."""
    paths = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return hashlib.sha256("".join(f"{sha256(folder / p)}  {p}\n" for p in paths).encode()).hexdigest()
