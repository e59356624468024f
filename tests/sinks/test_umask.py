"""Files get the permissions that the umask says, those that were written under a temporary name too."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from robbench.cli.app import main
from robbench.core.resources import new_folder, write_atomically, write_text_atomically

UMASKS = [0o022, 0o027, 0o077, 0o002]


@pytest.fixture(params=UMASKS, ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def modes(folder: Path) -> dict[str, int]:
    """Permissions of everything below a folder, and of itself."""
    return {
        str(path.relative_to(folder.parent)): path.stat().st_mode & 0o777
        for path in [folder, *folder.rglob("*")]
    }


def wrong(folder: Path, umask: int) -> dict[str, str]:
    """What has other permissions than a file or folder made under `umask`."""
    expected = {True: 0o777 & ~umask, False: 0o666 & ~umask}
    return {
        name: oct(mode)
        for name, mode in modes(folder).items()
        if mode != expected[(folder.parent / name).is_dir()]
    }


def replaced(path: Path) -> None:
    """Write as safetensors does: a private file of its own, renamed into the place."""
    own = path.with_suffix(".own")
    own.touch(mode=0o600)
    own.rename(path)


def test_files_and_folders_of_the_helpers(umask: int, tmp_path: Path) -> None:
    place = tmp_path / "place"
    write_text_atomically(place / "new.txt", "text")
    write_text_atomically(place / "new.txt", "replaced")
    write_atomically(place / "bytes", lambda path: path.write_bytes(b"x"))
    write_atomically(place / "by-safetensors", replaced)
    new_folder(place, "folder-")
    assert wrong(place, umask) == {}


@pytest.mark.parametrize("umask", [0o027], ids=oct, indirect=True)
def test_everything_that_commands_write(umask: int, tmp_path: Path) -> None:
    """A trained model, a run folder, a bundle, a merged run, a site, a page, a badge and a table."""
    folder, zoo = tmp_path / "all", tmp_path / "all" / "zoo"
    run, bundle = folder / "run", folder / "run.zip"
    model = ["--model", "digits-standard", "--attacks", "fgsm", "--keep-examples", "2"]
    commands = [
        [
            "train",
            "--defense",
            "standard",
            "--dataset",
            "digits",
            "--out",
            str(zoo),
            "--name",
            "small",
            "--epochs",
            "1",
            "--train-samples",
            "64",
        ],
        ["run", *model, "--n", "8", "--out", str(run)],
        ["export", str(run), "-o", str(bundle)],
        ["run", "--model", "digits-at", *model[2:], "--n", "8", "--out", str(folder / "second")],
        ["export", str(folder / "second"), "-o", str(folder / "second.zip")],
        ["merge", str(bundle), str(folder / "second.zip"), "-o", str(folder / "merged"), "--files-only"],
        ["report", str(run), "--out", str(folder / "site")],
        ["report", str(run), "--out", str(folder / "site")],
        ["report", str(run), "--out", str(folder / "page.html"), "--single-file"],
        ["badge", str(run), "--attack", "fgsm", "-o", str(folder / "badge.svg")],
        ["check", str(run), "--write-reference", str(folder / "reference.parquet"), "--reason", "test"],
    ]
    for command in commands:
        result = CliRunner().invoke(main, command, catch_exceptions=False)
        assert result.exit_code == 0, (command, result.output)
    assert wrong(folder, umask) == {}
