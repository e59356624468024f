"""`robbench merge`: verified bundles as one run folder, or as one bundle.

Runs with conflicts (`store.merged`) are refused with the reason. Shards are copied as they are: a merged run can be
exported, verified and merged again.
"""

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from robbench.bundle.archive import OpenBundle, check_parent, open_bundle
from robbench.bundle.examples import ExampleChoice
from robbench.bundle.export import ExportRequest, export_run
from robbench.bundle.findings import AGREES, Verification
from robbench.bundle.verify import Say, VerifyRequest, check_options, verify_open
from robbench.core.errors import UserError
from robbench.core.resources import new_folder
from robbench.store.columns import Images
from robbench.store.frechet_records import FRECHET_FOLDER, read_record
from robbench.store.ledger import Ledger, load_run
from robbench.store.merged import ROUNDING, merge_runs, source_of, version_conflicts
from robbench.store.records import Run, RunFile

BUNDLE_SUFFIX = ".zip"


@dataclass(frozen=True)
class MergeRequest:
    """bundles: two or more. out: a new or empty folder, or the name of a bundle (.zip). verify: options of the
    verification of each bundle (its `bundle` is replaced). accept_versions: merge measurements of different engines or
    major versions, which the tables then state."""

    bundles: tuple[Path, ...]
    out: Path
    verify: VerifyRequest = field(default_factory=lambda: VerifyRequest(Path()))
    accept_versions: bool = False


def merge_bundles(
    request: MergeRequest, say: Say, report: Callable[[Verification], None]
) -> tuple[bool, Path]:
    """Verify every bundle and write their union; returns whether it was written, and where.

    Nothing is written when something in a bundle differs, or (without files_only) could not be checked. report: called
    with every verification. `UserError` for bundles that cannot be merged and an `out` that exists.
    """
    _check(request)
    with ExitStack() as stack:
        bundles = [stack.enter_context(open_bundle(path)) for path in request.bundles]
        _check_different(bundles)
        names = [str(path) for path in request.bundles]
        runs = [bundle.run for bundle in bundles]
        merged = merge_runs(runs, names, request.accept_versions)  # fast, hence before the verification
        verdicts = [_verify(bundle, request, say, report) for bundle in bundles]
        if not all(verdicts):
            return False, request.out
        note = ". ".join([*_bundle_notes(bundles), *_notes(request, bundles, names)])
        _write(replace(merged, note=note), runs, request)
    return True, request.out


def _check(request: MergeRequest) -> None:
    check_options(request.verify)
    if len(request.bundles) < 2:
        raise UserError("merge puts several bundles into one; name at least two")
    if len({path.resolve() for path in request.bundles}) < len(request.bundles):
        raise UserError("one bundle is named twice; name each once")
    out = request.out
    taken = out.exists() and (not out.is_dir() or any(out.iterdir()))
    if taken or (out.is_dir() and out.suffix == BUNDLE_SUFFIX):
        raise UserError(
            f"-o {str(out)!r} exists; give a new or empty folder, or the name of a new bundle (.zip)"
        )
    if out.is_symlink() or (out.exists() and out.samefile(Path())):
        what = "is a link" if out.is_symlink() else "is the folder you are in"
        raise UserError(f"-o {str(out)!r} {what}, which cannot be replaced; give the name of a new folder")
    check_parent(out)


def _check_different(bundles: Sequence[OpenBundle]) -> None:
    first: dict[str, OpenBundle] = {}
    for bundle in bundles:
        other = first.setdefault(bundle.sha256, bundle)
        if other is not bundle:
            raise UserError(
                f"bundles {str(other.path)!r} and {str(bundle.path)!r} are the same; name one of them"
            )


def _verify(
    bundle: OpenBundle, request: MergeRequest, say: Say, report: Callable[[Verification], None]
) -> bool:
    result = verify_open(bundle, replace(request.verify, bundle=bundle.path, several=True), say)
    report(result)
    return result.exit_code == AGREES


def _bundle_notes(bundles: Sequence[OpenBundle]) -> Iterator[str]:
    """The notes in the bundles, which are their own claims."""
    for bundle in bundles:
        if bundle.run.note:
            yield f"{bundle.path.name} says of itself: {bundle.run.note!r}"


def _notes(request: MergeRequest, bundles: Sequence[OpenBundle], names: Sequence[str]) -> Iterator[str]:
    """Notes on the merge that every table shows."""
    listed = ", ".join(f"{bundle.path.name} ({bundle.sha256[:12]})" for bundle in bundles)
    verify = request.verify
    if verify.files_only:
        yield f"Merged from {listed}; not re-scored: rows and tables agree with each other, no model was asked"
    else:
        samples = "" if verify.rerun_samples is None else f" on {verify.rerun_samples} samples each"
        yield f"Merged from {listed}; stored examples re-scored, {100 * verify.share:g} % of the cells re-run{samples}"
    runs = [bundle.run for bundle in bundles]
    apart = version_conflicts(runs, [Path(name).name for name in names])
    if apart:
        yield f"Versions differ: {'; '.join(text.split('; ')[0] for text in apart)}"


def _write(merged: Run, runs: Sequence[Run], request: MergeRequest) -> None:
    """Write the folder, or the bundle, completely or not at all."""
    out = request.out
    with _new_folder(out.absolute().parent) as folder:
        _fill(folder, merged, runs)
        if out.suffix == BUNDLE_SUFFIX:
            partial = any(result.cell.status != "ok" for result in merged.cells)
            choice = ExampleChoice.parse("all")
            export_run(
                ExportRequest(folder, out, choice, partial, threat_models=request.verify.threat_models)
            )
            return
        load_run(folder)
        if out.exists():
            out.rmdir()
        folder.rename(out)


@contextmanager
def _new_folder(parent: Path) -> Iterator[Path]:
    folder = new_folder(parent, ".robbench-merge-")
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _fill(folder: Path, merged: Run, runs: Sequence[Run]) -> None:
    ledger = Ledger(folder)
    for result in merged.cells:
        target = ledger.cell_folder(result.cell.hash)
        if not target.exists():
            shutil.copytree(Ledger(source_of(runs, result).folder).cell_folder(result.cell.hash), target)
    originals = _originals(runs)
    if originals:
        ledger.add_originals(originals, _refuse)
    _copy_frechet(folder, runs)
    ledger.write_run(_run_file(merged), merged.cards)


def _run_file(merged: Run) -> RunFile:
    return RunFile.of(
        [result.cell for result in merged.cells],
        merged.sample_ids,
        dataset=merged.dataset,
        dataset_revision=merged.dataset_revision,
        seed=merged.seed,
        shape=merged.shape,
        class_names=merged.class_names,
        data=merged.data,
        versions=merged.versions,
        note=merged.note,
    )


def _originals(runs: Sequence[Run]) -> dict[int, Images]:
    found: dict[int, Images] = {}
    for run in runs:
        for i, image in Ledger(run.folder).originals().items():
            if not np.array_equal(found.setdefault(i, image), image):
                raise UserError(
                    f"two bundles hold different clean images of sample {i}; verify each with the data set at hand"
                )
    return found


def _refuse(path: Path, reason: str) -> None:
    raise UserError(f"{path} {reason}; merge into an empty folder")


def _copy_frechet(folder: Path, runs: Sequence[Run]) -> None:
    """Copy the Fréchet distances of all runs; `UserError` where two runs disagree on one."""
    for path in (path for run in runs for path in sorted((run.folder / FRECHET_FOLDER).glob("*.json"))):
        target = folder / FRECHET_FOLDER / path.name
        if target.exists():
            values = [record.value or 0.0 for record in (read_record(target), read_record(path))]
            if not math.isclose(*values, rel_tol=ROUNDING, abs_tol=ROUNDING):
                raise UserError(
                    f"two bundles state another Fréchet distance ({values[0]:.4g} and {values[1]:.4g}) of one cell "
                    f"({path.stem}); compute it again with robbench fid and export both"
                )
            continue
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)
