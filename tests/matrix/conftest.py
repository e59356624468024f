"""A small zoo of its own for tests that run the matrix."""

from pathlib import Path

import pytest
from tiny_models import saved_model, trained_classifier


@pytest.fixture(scope="session")
def tiny_zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two trained classifiers of defense "tiny": tiny-a and tiny-b. Read only."""
    folder = tmp_path_factory.mktemp("zoo")
    for seed, name in enumerate(("tiny-a", "tiny-b")):
        saved_model(folder, name, trained_classifier(seed))
    return folder


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory is a fresh temporary folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
