"""Runs wherever they are: folders of `robbench run`, and bundles, side by side."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from robbench.bundle.archive import opened_bundle
from robbench.store.ledger import load_run
from robbench.store.records import Run


@contextmanager
def opened_runs(paths: Sequence[Path]) -> Iterator[list[Run]]:
    """The runs at `paths`, in that order: a file is taken as a bundle and checked (`opened_bundle`), anything else as a
    run folder. Runs of bundles live in temporary folders until the context ends: read what you need before.

    `UserError` for a folder that is no run and a bundle that is refused.
    """
    with ExitStack() as stack:
        yield [
            stack.enter_context(opened_bundle(path)).run if path.is_file() else load_run(path)
            for path in paths
        ]
