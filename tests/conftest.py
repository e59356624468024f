"""Fixtures that tests share: digits, a small trained classifier, a small flow, 48 test images, a tiny zoo."""

import copy
import os
from pathlib import Path

import pytest

# Tests run in one process a core: more threads would wait for each other. Commands that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # reads it
from hypothesis import settings
from tiny_models import saved_model, trained_classifier
from torch.nn.functional import cross_entropy

from robbench.core import schema
from robbench.core.resources import data_root
from robbench.data import load_dataset
from robbench.models import loading
from robbench.models.classifiers import digits_cnn
from robbench.models.entry import ZooEntry
from robbench.models.flows.base import FrozenFlow
from robbench.models.flows.glow import Glow

# How long an example takes says how busy the machine is, and no test is about that.
settings.register_profile("robbench", deadline=None)
settings.load_profile("robbench")

_parse_yaml, _documents = schema.parse_yaml, dict[str, object]()


def _parse_yaml_once(text: str, origin: str) -> object:
    """`parse_yaml`, once for every text: the shipped cards and threat models are half the time of a small command."""
    if text not in _documents:
        _documents[text] = _parse_yaml(text, origin)
    return copy.deepcopy(_documents[text])


schema.parse_yaml = _parse_yaml_once

_load_flow, _flows, _shipped_zoo = loading.load_flow, dict[str, FrozenFlow](), data_root() / "zoo"


def _load_flow_once(entry: ZooEntry, device: torch.device | str = "cpu") -> FrozenFlow:
    """`load_flow`, which tries a shipped flow once: every run on digits loads one, and a small run takes as long."""
    if entry.folder.parent != _shipped_zoo:
        return _load_flow(entry, device)
    key = f"{device} {entry.card.model_dump_json()}"
    if key not in _flows:
        _flows[key] = _load_flow(entry, device)
    return copy.deepcopy(_flows[key])


loading.load_flow = _load_flow_once

# Files that take longest go first, so that no process of pytest waits for one that began at the end.
LONGEST = (
    "test_ray",
    "test_untrusted_models",
    "test_run_page",
    "test_site_board",
    "test_bench_pgd",
    "test_plugins",
    "test_contract",
    "test_experiment_run",
    "test_verify",
    "test_merge",
    "test_frechet_run",
    "test_flow_cells",
    "test_broken_attacks",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONGEST)))


@pytest.fixture(scope="session")
def digits():
    return load_dataset("digits")


@pytest.fixture(scope="session")
def classifier(digits):
    """A digits CNN after a few epochs of Adam; eval mode, no parameter gradients."""
    x, y = digits.train.x(torch.arange(len(digits.train))), digits.train.labels
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = digits_cnn((1, 8, 8), 10)
        optimizer = torch.optim.Adam(model.parameters(), 0.005)
        for _ in range(10):
            for rows in torch.randperm(len(x)).split(64):
                optimizer.zero_grad()
                cross_entropy(model(x[rows]), y[rows]).backward()
                optimizer.step()
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def flow(digits):
    """A two-level Glow with slightly perturbed weights: no trained density, but no identity either."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Glow((1, 8, 8), digits.grey_levels, levels=2, steps=2, width=16)
        model.initialize(digits.train.x(torch.arange(256)))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def tiny_zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A zoo of two trained classifiers of defense "tiny": tiny-a and tiny-b. Read only."""
    folder = tmp_path_factory.mktemp("zoo")
    for seed, name in enumerate(("tiny-a", "tiny-b")):
        saved_model(folder, name, trained_classifier(seed))
    return folder


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory is a fresh temporary folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def images(digits):
    """(ids, x, y) of 48 test images."""
    rows = torch.arange(48)
    return digits.test.ids[rows], digits.test.x(rows), digits.test.labels[rows]


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder with real data sets beside the checkout; tests that need it are skipped where it is absent."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not (folder / "data" / "FashionMNIST").is_dir():
        pytest.skip("../shared/data with real data sets is absent")
    return folder
