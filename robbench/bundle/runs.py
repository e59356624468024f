"""Runs in folders and in bundles."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from robbench.bundle.archive import open_bundle
from robbench.store.ledger import load_run
from robbench.store.records import Run


@contextmanager
def open_runs(paths: Sequence[Path]) -> Iterator[list[Run]]:
    """The runs at `paths`, in that order: a file is a bundle, which is checked (`open_bundle`), anything else a run
    folder. Files of bundles exist only inside the context.

    `UserError` for a folder that is not a run and a bundle that is refused.
    """
    with ExitStack() as stack:
        yield [
            stack.enter_context(open_bundle(path)).run if path.is_file() else load_run(path) for path in paths
        ]
