"""Bundles as files: a run folder and its manifest in a zip file, with the same bytes for the same content.

`open_bundle` checks everything that needs no model before any number is read.
"""

import io
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile, ZipInfo

from robbench import __version__
from robbench.bundle.contents import check_contents, reword
from robbench.bundle.manifest import LAYOUT, MANIFEST_FILE, MANIFEST_VERSION, FileEntry, Manifest
from robbench.bundle.zipcheck import Limits, copy_entry, open_zip, refusal
from robbench.core.errors import UserError
from robbench.core.resources import sha256_file, write_atomically
from robbench.core.schema import LARGEST, parse_json, validate
from robbench.store.ledger import load_run
from robbench.store.records import Run

_EPOCH = (1980, 1, 1, 0, 0, 0)  # earliest date in a zip file


@dataclass(frozen=True)
class OpenBundle:
    """A bundle whose contents are checked and unpacked.

    Attributes:
        path: the bundle file.
        sha256: of the bundle file.
        manifest: its manifest.
        folder: the unpacked run folder, removed with the context.
        run: the run in it.
    """

    path: Path
    sha256: str
    manifest: Manifest
    folder: Path
    run: Run


def check_parent(out: Path) -> None:
    """`UserError` unless the parent folder of `out` exists and can be written."""
    parent = out.absolute().parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        problem = "cannot be written" if parent.is_dir() else "is no folder"
        raise UserError(
            f"-o {str(out)!r}: {str(parent)!r} {problem}; give a name in a folder you may write to"
        )


def file_entries(folder: Path) -> dict[str, FileEntry]:
    """Every file below `folder` but the manifest, by its name in the bundle, sorted."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return {
        name: FileEntry(sha256=sha256_file(folder / name), size=(folder / name).stat().st_size)
        for name in names
        if name != MANIFEST_FILE
    }


def pack(folder: Path, manifest: Manifest, target: Path) -> Manifest:
    """Write the files below `folder` as a bundle, atomically; returns the manifest with their hashes.

    The same folder and manifest give the same bytes: names are sorted, time stamps and permissions are constant.
    """
    complete = manifest.model_copy(update={"files": file_entries(folder)})

    def save(temporary: Path) -> None:
        with ZipFile(temporary, "w") as archive:
            _add(archive, MANIFEST_FILE, (complete.model_dump_json(indent=1) + "\n").encode())
            for name in complete.files:
                _add(archive, name, (folder / name).read_bytes())

    write_atomically(target, save)
    return complete


def _add(archive: ZipFile, name: str, content: bytes) -> None:
    """Add a file, deflated where that makes it smaller; shards are mostly compressed already."""
    info = ZipInfo(name, _EPOCH)
    info.create_system, info.external_attr = 3, 0o100644 << 16  # whatever system writes it
    with ZipFile(io.BytesIO(), "w") as trial:
        trial.writestr(name, content, ZIP_DEFLATED, 9)
        smaller = trial.getinfo(name).compress_size < len(content)
    archive.writestr(info, content, ZIP_DEFLATED if smaller else ZIP_STORED, 9 if smaller else None)


@contextmanager
def open_bundle(path: Path, limits: Limits | None = None) -> Iterator[OpenBundle]:
    """Check a bundle, unpack it into a temporary folder and read its run; the folder is removed in any case.

    `UserError` with the reason: not a zip file, a zip bomb, a name that leaves the folder or occurs twice, a link, an
    encrypted entry, a manifest of a newer schema, a file that is missing, not listed or not as hashed, weights of
    another model, other numbers of rows or examples than the manifest states.
    """
    limits = limits or Limits()
    with tempfile.TemporaryDirectory(prefix="robbench-bundle-") as name:
        folder = Path(name) / (path.stem.strip(".") or "bundle")  # name of the run in tables
        folder.mkdir()
        with open_zip(path, limits) as (archive, entries):
            manifest = _manifest(path, archive, entries)
            _check_files(path, manifest, set(entries) - {MANIFEST_FILE})
            for listed in sorted(manifest.files):
                _extract(path, archive, entries[listed], manifest, folder)
        check_contents(path, folder, manifest)
        yield OpenBundle(path, sha256_file(path), manifest, folder, _load_run(path, folder, manifest))


def _manifest(path: Path, archive: ZipFile, entries: dict[str, ZipInfo]) -> Manifest:
    if MANIFEST_FILE not in entries:
        raise refusal(path, f"it has no {MANIFEST_FILE}; give a file written by `robbench export`")
    buffer, entry = io.BytesIO(), entries[MANIFEST_FILE]
    copy_entry(path, archive, entry, buffer, min(LARGEST, entry.file_size))
    try:
        content = parse_json(buffer.getvalue())
    except ValueError as error:
        raise refusal(path, f"{MANIFEST_FILE} is not JSON ({' '.join(str(error).split())[:80]})") from error
    _check_version(path, content)
    try:
        return validate(content, Manifest, MANIFEST_FILE)
    except UserError as error:
        raise refusal(path, str(error)) from error


def _check_version(path: Path, content: object) -> None:
    """Refuse a newer manifest, before its keys are checked."""
    version = content.get("schema_version") if isinstance(content, dict) else None
    if not isinstance(content, dict) or not isinstance(version, int) or version <= MANIFEST_VERSION:
        return
    versions = content.get("versions")
    writer = versions.get("robbench") if isinstance(versions, dict) else None
    reader = f"robbench >= {writer}" if isinstance(writer, str) and len(writer) < 40 else "a newer robbench"
    raise refusal(
        path,
        f"written by a newer robbench (bundle schema {version}); {reader} can read it, this is {__version__}",
    )


def _check_files(path: Path, manifest: Manifest, names: set[str]) -> None:
    """Require that the files are those of the manifest and belong into a bundle."""
    missing = sorted(manifest.files.keys() - names)
    if missing:
        more = f" (+{len(missing) - 1} more)" if len(missing) > 1 else ""
        raise refusal(path, f"file {missing[0]!r}{_of_cell(manifest, missing[0])} is missing{more}")
    unlisted = sorted(names - manifest.files.keys())
    if unlisted:
        raise refusal(path, f"file {unlisted[0]!r} is not listed in {MANIFEST_FILE}")
    strange = sorted(name for name in names if not LAYOUT.fullmatch(name))
    if strange:
        raise refusal(path, f"file {strange[0]!r} has no place in a bundle")


def _of_cell(manifest: Manifest, name: str) -> str:
    """ " of cell digits-at x pgd20 (...)" for a file of a cell."""
    parts = name.split("/")
    titles = [cell.title for cell in manifest.cells if len(parts) == 3 and cell.hash[:16] == parts[1]]
    return f" of cell {titles[0]}" if titles else ""


def _extract(path: Path, archive: ZipFile, entry: ZipInfo, manifest: Manifest, folder: Path) -> None:
    expected, target = manifest.files[entry.filename], folder / entry.filename
    what = f"file {entry.filename!r}{_of_cell(manifest, entry.filename)}"
    if expected.size > LARGEST and entry.filename.endswith((".json", ".yaml")):
        raise refusal(path, f"{what} has {expected.size:,} bytes, at most {LARGEST:,} are read as text")
    if entry.file_size != expected.size:
        raise refusal(path, f"{what} has {entry.file_size:,} bytes, {MANIFEST_FILE} says {expected.size:,}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("xb") as stream:
        digest = copy_entry(path, archive, entry, stream, expected.size)
    if digest != expected.sha256:
        raise refusal(path, f"{what} is not what {MANIFEST_FILE} hashed (sha256 {digest[:12]})")


def _load_run(path: Path, folder: Path, manifest: Manifest) -> Run:
    """The run in a bundle; refused unless it has as many rows and examples per cell as the manifest states."""
    try:
        run = load_run(folder)
    except UserError as error:
        raise reword(path, folder, error) from error
    for cell, result in zip(manifest.cells, run.cells, strict=True):
        found = {
            "rows": len(result.rows),
            "examples": int(result.rows["example"].notna().sum()),
            "status": result.cell.status,
        }
        for what, value in found.items():
            if value != getattr(cell, what):
                says = f"{MANIFEST_FILE} says {getattr(cell, what)}"
                raise refusal(path, f"cell {cell.title} has {what} {value}, {says}")
    _check_totals(path, manifest, run)
    return run


def _check_totals(path: Path, manifest: Manifest, run: Run) -> None:
    """Check the manifest's total numbers of examples and witnesses, and that nothing is unfinished."""
    unique = {result.cell.hash: result.rows for result in run.cells}.values()
    for what, column in (("exported", "example"), ("witnesses", "witness")):
        found = sum(int(rows[column].notna().sum()) for rows in unique if column in rows)
        says = getattr(manifest.examples, what)
        if found != says:
            raise refusal(path, f"it holds {found} values of {column}, {MANIFEST_FILE} says {says}")
    unfinished = [cell for cell in manifest.cells if cell.status != "ok"]
    if unfinished and not manifest.partial:
        cell = unfinished[0]
        raise refusal(path, f"cell {cell.title} is {cell.status!r}, and {MANIFEST_FILE} calls it complete")
