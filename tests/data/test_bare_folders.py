"""A folder of class folders is a data set: what is read, in which order, at which size, and what is refused."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from PIL import Image
from torchvision.transforms import functional as transforms

from robbench.cli.app import main
from robbench.core.errors import UserError
from robbench.data import bare
from robbench.data.bare import HEADER, own_data
from robbench.data.base import Dataset
from robbench.data.folder import load_folder
from robbench.data.imagenet import imagenet
from robbench.models.zoo import zoo_entries
from robbench.store.ledger import load_run


def picture(height: int, width: int, seed: int = 0, mode: str = "RGB") -> Image.Image:
    """Random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 4), dtype=np.uint8)
    channels = {"L": 1, "RGB": 3, "RGBA": 4}[mode]
    return Image.fromarray(pixels[..., 0] if channels == 1 else pixels[..., :channels])


def pets(folder: Path, names: tuple[str, ...] = ("cat", "Ant", "bee"), **picture_of: int) -> Path:
    """Two PNG files a class, 8x8 unless said otherwise."""
    for label, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for number in range(2):
            one = picture(**{"height": 8, "width": 8, "seed": 10 * label + number, **picture_of})
            one.save(folder / name / f"{number}.png")
    return folder


def loaded(folder: Path, size: str | None = None, like: str | None = None) -> Dataset:
    return load_folder(own_data(folder, size, like, lambda name: folder.parent / name).path)


def refused(folder: Path, *parts: str, size: str | None = None) -> None:
    with pytest.raises(UserError) as caught:
        loaded(folder, size)
    text = str(caught.value)
    assert "\n" not in text
    for part in parts:
        assert part in text
    assert not (folder / "card.yaml").exists()


def test_classes_are_sorted_and_ids_follow_the_paths(tmp_path: Path) -> None:
    folder = pets(tmp_path / "my pets", height=33, width=17)
    (folder / "bee" / "deep").mkdir()
    picture(33, 17, 7).save(folder / "bee" / "deep" / "x.png")
    for clutter in (folder / ".git", folder / "bee" / ".cache"):
        clutter.mkdir()
        (clutter / "a.txt").touch()
    for clutter in (folder / "README.txt", folder / "bee" / "Thumbs.db", folder / "bee" / ".DS_Store"):
        clutter.write_bytes(b"x")
    own = own_data(folder, None, None, lambda _: tmp_path / "run")
    assert own.name == "my-pets"
    assert own.line.endswith(f"RGB 33 x 17, as the files are; card written to {folder / 'card.yaml'}")
    data = load_folder(own.path)
    assert data.class_names == ("Ant", "bee", "cat")
    assert data.test.labels.tolist() == [0, 0, 1, 1, 1, 2, 2]
    assert data.test.ids.tolist() == list(range(7))
    for position, file in enumerate(("Ant/0", "Ant/1", "bee/0", "bee/1", "bee/deep/x", "cat/0", "cat/1")):
        pixels = np.asarray(Image.open(folder / f"{file}.png"))
        assert np.array_equal(data.test.images[position].permute(1, 2, 0).numpy(), pixels), file
    again = own_data(folder, None, None, lambda _: tmp_path / "run")
    assert (again.name, again.path, again.line) == (own.name, folder, "")
    picture(33, 17, 8).save(folder / "cat" / "2.png")
    with pytest.raises(UserError, match=r"has sha256 .* or remove card\.yaml if robbench wrote it"):
        loaded(folder)
    (folder / "card.yaml").unlink()
    assert loaded(folder).revision != data.revision


def test_grey_and_colour(tmp_path: Path) -> None:
    grey = pets(tmp_path / "grey")
    for path in grey.rglob("*.png"):
        Image.open(path).convert("L").save(path)
    assert loaded(grey).shape == (1, 8, 8)
    mixed = pets(tmp_path / "mixed")
    picture(8, 8, mode="L").save(mixed / "bee" / "0.png")
    Image.new("RGB", (8, 8), (9, 8, 7)).quantize(2).save(mixed / "bee" / "1.png")
    data = loaded(mixed)
    assert data.shape == (3, 8, 8)
    assert data.test.images[2].tolist() == [np.asarray(picture(8, 8, mode="L")).tolist()] * 3
    assert data.test.images[3, :, 0, 0].tolist() == [9, 8, 7]


def test_resizing_is_asked_for_named_and_pillows(tmp_path: Path) -> None:
    folder = pets(tmp_path / "pets")
    picture(33, 17, 5).save(folder / "cat" / "1.png")
    picture(28, 40, 6).save(folder / "cat" / "0.jpg")
    refused(folder, "images have 3 sizes", "8 x 8", "give --size N")
    refused(folder, "--size '8x0' is no size", size="8x0")
    refused(folder, "--size '1e2' is no size", size="1e2")
    data = loaded(folder, size="12")
    assert data.shape == (3, 12, 12)
    scale = 33 * 12 // 17  # the longer side, rounded down
    whole = picture(33, 17, 5).resize((12, scale), Image.Resampling.LANCZOS)
    top = round((scale - 12) / 2)
    assert np.array_equal(data.test.images[-1].permute(1, 2, 0).numpy(), np.asarray(whole)[top : top + 12])
    assert "images resized to a shorter side of 12 (Pillow's lanczos), centre 12 x 12 cut out" in data.note
    assert "1 of 7 images are lossy" in data.note
    assert loaded(folder).shape == (3, 12, 12), "the card says so now"
    with pytest.raises(UserError, match=r"--size 16: .*card\.yaml says 12 x 12, resized to 12 by lanczos"):
        own_data(folder, "16", None, lambda _: tmp_path)
    assert own_data(folder, "12", None, lambda _: tmp_path).line == ""


def rgba(path: Path) -> None:
    picture(8, 8, mode="RGBA").save(path)


def deep(path: Path) -> None:
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(path)


def clear(path: Path) -> None:
    Image.new("P", (8, 8)).save(path, transparency=0)


def words(path: Path) -> None:
    path.write_text("no image")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:60])


def bomb(path: Path) -> None:
    header = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk)


def half_a_bomb(path: Path) -> None:
    Image.new("1", (14_000, 14_000)).save(path)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/etc/hostname")


@pytest.mark.parametrize(
    ("spoil", "part"),
    [
        (rgba, "has mode RGBA; save it as grey or RGB"),
        (deep, "has mode I;16"),
        (clear, "has mode P with transparency"),
        (words, "cannot be decoded"),
        (cut, "cannot be decoded"),
        (bomb, "cannot be decoded"),
        (half_a_bomb, "cannot be decoded"),
        (empty, "cannot be decoded"),
        (link, "is a link"),
    ],
)
def test_files_that_are_refused_by_name(spoil, part: str, tmp_path: Path) -> None:
    folder = pets(tmp_path / "pets")
    path = folder / "bee" / "1.png"
    spoil(path)
    if spoil is cut:  # its header is whole: found when it is decoded, after the card was written
        with pytest.raises(UserError, match=r"bee/1\.png: cannot be decoded"):
            loaded(folder)
        return
    refused(folder, str(path), part)


def test_folders_that_are_refused(tmp_path: Path) -> None:
    refused(pets(tmp_path / "one", ("cat",)), "one class folder, 'cat'")
    (pets(tmp_path / "void") / "dog").mkdir()
    refused(tmp_path / "void", "dog: holds no image")
    refused(pets(tmp_path / "case", ("Cat", "cat")), "'Cat' and 'cat' differ in case only")
    refused(
        pets(tmp_path / "line", ("a\nb", "c")), "class folder 'a\\nb' has characters that cannot be printed"
    )
    refused(
        pets(tmp_path / "splits", ("train", "val")), "look like splits", f"--dataset {tmp_path}/splits/train"
    )
    picture(8, 8).save(pets(tmp_path / "beside") / "x.png")
    refused(tmp_path / "beside", "x.png: lies beside the class folders")
    (pets(tmp_path / "notes") / "bee" / "notes.txt").touch()
    refused(tmp_path / "notes", "notes.txt: .txt is no image format")
    outside = pets(tmp_path / "outside")
    (pets(tmp_path / "linked") / "dog").symlink_to(outside / "bee", target_is_directory=True)
    refused(tmp_path / "linked", "dog: is a link")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "holds no card.yaml and no class folders")
    refused(tmp_path / "absent", "is not a folder")


def test_odd_class_names_survive(tmp_path: Path) -> None:
    names = ("-rf", "a b", "größe", "null", "1e3", "<b>", "日本")
    data = loaded(pets(tmp_path / "naïve", names))
    assert data.class_names == tuple(sorted(names))
    assert data.name == "na-ve"


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, run = pets(tmp_path / "pets"), tmp_path / "run"
    whole = bare.write_text_atomically

    def write(path: Path, text: str) -> None:
        if path.parent == folder:
            raise PermissionError(13, "Permission denied")
        whole(path, text)

    monkeypatch.setattr(bare, "write_text_atomically", write)
    own = own_data(folder, None, None, lambda _: run)
    assert own.line.endswith(f"card written to {run / 'card.yaml'}")
    assert len(load_folder(own.path).test) == 6
    again = own_data(folder, None, None, lambda _: run)
    assert (again.path, again.line) == (run / "card.yaml", "")


def test_a_card_of_ones_own_is_not_rewritten(tmp_path: Path) -> None:
    folder = pets(tmp_path / "pets")
    loaded(folder)
    card = folder / "card.yaml"
    assert own_data(folder, None, "cifar10", lambda _: tmp_path).line == f"{card}: now like cifar10"
    with pytest.raises(UserError, match=r"unknown data set 'cifar'; did you mean 'cifar10'"):
        own_data(folder, None, "cifar", lambda _: tmp_path)
    card.write_text(card.read_text(encoding="utf-8").removeprefix(HEADER), encoding="utf-8")
    with pytest.raises(UserError, match=r"--like digits: .*says like: cifar10; change it there"):
        own_data(folder, None, "digits", lambda _: tmp_path)


# ---------------------------------------------------------------------------------------------------- commands
def invoked(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def scans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """24 test images of scikit-learn's digits as PNG files: the classes 1, 4 and 7, eight of each."""
    from robbench.data import load_dataset

    test = load_dataset("digits").test
    for label in (1, 4, 7):
        (tmp_path / "scans" / str(label)).mkdir(parents=True)
        for position in (test.labels == label).nonzero().flatten()[:8].tolist():
            grey = np.round(test.images[position, 0].numpy() * (255 / 16)).astype(np.uint8)
            Image.fromarray(grey).save(tmp_path / "scans" / str(label) / f"{position:03}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "scans"


def test_run_on_a_folder_of_some_of_a_models_classes(scans: Path) -> None:
    """The whole way: the budget, the label map, and numbers that the model itself confirms."""
    run = ("run", "--model", "digits-at", "--attacks", "pgd10", "--device", "cpu", "--dataset")
    result = invoked(*run, "scans/")
    assert result.exit_code == 2
    assert "has no epsilon for data set 'scans'; give --epsilon VALUE, --like NAME" in result.stderr
    result = invoked(*run, "scans", "--like", "digits")
    assert result.exit_code == 2
    assert "returns 10 logits per image, scans has 3 classes" in result.stderr
    assert "classes: [" in result.stderr
    card = scans / "card.yaml"
    content = yaml.safe_load(card.read_text(encoding="utf-8"))
    for classes, part in (
        ([1, 4], "one logit a class"),
        ([1, 4, 4], "named twice"),
        ([1, 4, 70], "names 70"),
    ):
        card.write_text(yaml.safe_dump({**content, "classes": classes}), encoding="utf-8")
        assert part in invoked(*run, "scans").stderr
    card.write_text(yaml.safe_dump({**content, "classes": [1, 4, 7]}), encoding="utf-8")
    result = invoked(*run, "scans", "--keep-examples", "all")
    assert result.exit_code == 0, result.stderr
    assert "no bits/dim and no latent attacks: flow 'digits-glow'" in result.output

    done = load_run(Path("robbench-runs/scans-seed0"))
    assert done.data is not None
    assert done.data.classes == done.cards["digits-at"].logits == (1, 4, 7)
    assert done.cells[0].cell.attack.epsilon == 0.2
    rows = done.cells[0].rows
    assert set(rows["prediction"]) <= {0, 1, 2}

    from robbench.models.loading import load_model

    data, whole = load_folder(scans), load_model(zoo_entries()["digits-at"]).module
    x, y = data.test.by_ids(rows["sample_id"].tolist())
    with torch.no_grad():
        logits = whole(x)[:, [1, 4, 7]]
    assert (rows["clean_prediction"].to_numpy() == logits.argmax(1).numpy()).all()
    assert rows["label"].tolist() == y.tolist()
    assert rows["robust"].mean() < 1, "the attack finds something"

    exported = invoked("export", done.folder, "-o", "scans.zip", "--examples", "all")
    assert exported.exit_code == 0, exported.stderr
    verified = invoked("verify", "scans.zip", "--data", "scans", "--rerun-samples", 8)
    assert "differs" not in verified.output, verified.output
    assert "re-run" in verified.output


def test_the_map_is_part_of_a_cells_address() -> None:
    entry = zoo_entries()["digits-at"]
    hashes = {entry.restricted(logits).card.function_hash for logits in (None, (1, 4), (4, 1))}
    assert len(hashes) == 3
    with pytest.raises(UserError, match="restricted to other logits"):
        entry.restricted((1, 4)).restricted((4, 1))


def test_a_folder_is_not_what_a_name_means(scans: Path) -> None:
    (scans.parent / "digits").mkdir()
    options = ("--model", "digits-at", "--attacks", "fgsm", "--n", 4, "--dry-run")
    assert "digits, 4 samples" in invoked("run", "--dataset", "digits", *options).output
    assert "class folders" in invoked("run", "--dataset", "./digits", *options).stderr
    assert "--like digits is for a folder" in invoked("run", "--like", "digits", *options).stderr
    both = invoked("run", "--dataset", "scans", "--data", "scans", *options)
    assert "name two data sets" in both.stderr
    assert not (scans / "card.yaml").exists()


def test_imagenet_is_a_thousand_folders_cut_as_torchvision_does(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("robbench.data.images.IN_MEMORY", 0)
    folder = tmp_path / "imagenet" / "val"
    for number in range(1000):
        (folder / f"n{number:08}").mkdir(parents=True)
        (folder / f"n{number:08}" / "a.JPEG").touch()
    wide, transparent = picture(40, 61, 3), picture(50, 30, 4, "RGBA")
    wide.save(folder / "n00000007" / "a.JPEG")
    transparent.save(folder / "n00000003" / "a.JPEG", format="PNG")
    data = imagenet(tmp_path)
    assert (data.shape, len(data.test), len(data.train), data.classes) == ((3, 224, 224), 1000, 0, 1000)
    x, y = data.test.by_ids([7, 3])
    assert y.tolist() == [7, 3]
    for found, path in zip(x, ("n00000007", "n00000003"), strict=True):
        image = Image.open(folder / path / "a.JPEG").convert("RGB")
        expected = transforms.center_crop(transforms.resize(image, 256), 224)
        assert np.array_equal((found * 255).round().permute(1, 2, 0).numpy(), np.asarray(expected))
    assert "1,000 of the 50,000 validation images" in data.note
    assert "shorter side of 256 (Pillow's bilinear), centre 224 x 224" in data.note
    with pytest.raises(UserError, match=r"n00000000/a\.JPEG: cannot be decoded"):
        data.test.by_ids([0])
    before = data.revision
    (folder / "n00000000" / "a.JPEG").write_bytes(b"x")
    assert imagenet(tmp_path).revision != before
    (folder / "n00000999" / "a.JPEG").unlink()
    (folder / "n00000999").rmdir()
    with pytest.raises(UserError, match="holds 999 class folders, not 1000"):
        imagenet(tmp_path)
    with pytest.raises(UserError, match=r"not in .* and cannot be downloaded"):
        imagenet(tmp_path / "x")
