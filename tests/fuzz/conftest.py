"""Everything in this folder is slow; see CONTRIBUTING.md. ROBBENCH_FUZZ scales the number of cases."""

from pathlib import Path

import pytest
from fuzzing import attacked

from robbench.bundle.examples import ExampleChoice
from robbench.bundle.export import ExportRequest, export_run


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing has happened to."""
    return attacked(tmp_path_factory.mktemp("undisturbed") / "run")


@pytest.fixture(scope="session")
def bundle(undisturbed: Path) -> Path:
    """The same run as a bundle."""
    path = undisturbed.parent / "run.zip"
    export_run(ExportRequest(undisturbed, path, ExampleChoice.parse("all")))
    return path
