"""Fréchet distances of whole runs: values against the features' own definition, caches, and what cannot be scored."""

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import scipy.linalg
import torch
from click.testing import CliRunner, Result
from tiny_models import saved_model, trained_classifier
from torch import nn

from robbench.cli.base import OneLineErrors
from robbench.cli.fid import fid
from robbench.cli.run import run_matrix
from robbench.core.device import versions
from robbench.core.errors import UserError
from robbench.run import frechet
from robbench.run.features import FeatureExtractor
from robbench.run.frechet import FrechetRequest, score_run
from robbench.run.request import RunRequest
from robbench.store.frechet_records import FrechetRecord, load_frechet
from robbench.store.ledger import Ledger, load_run
from robbench.store.records import CellResult

N, EVERYTHING = 150, 2**62
REFERENCE_N = 1257 + 180


class Lines:
    """A progress that remembers what it was told."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.sets: list[str] = []

    def advanced(self, what: str, done: int, total: int) -> None:
        assert 0 < done <= total
        if done == total:
            self.sets.append(what)

    def message(self, line: str) -> None:
        self.messages.append(line)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty user cache; returns the folder of reference statistics in it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "robbench" / "frechet"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the batches that extractors were called with."""
    sizes: list[int] = []
    original = FeatureExtractor.__call__

    def counted(self: FeatureExtractor, images: torch.Tensor) -> np.ndarray:
        sizes.append(len(images))
        return original(self, images)

    monkeypatch.setattr(FeatureExtractor, "__call__", counted)
    return sizes


def run_request(tiny_zoo: Path, **changes: object) -> RunRequest:
    fields = {"attacks": ("fgsm", "pgd10"), "models": ("tiny-a",), "zoo": tiny_zoo, "n": N, "device": "cpu"}
    return RunRequest(**(fields | {"keep_examples": EVERYTHING} | changes))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def finished(tiny_zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert run_matrix(run_request(tiny_zoo), folder) == 0
    return folder


@pytest.fixture
def run_folder(finished: Path, tmp_path: Path) -> Path:
    """A run of tiny-a under fgsm and pgd10 with every adversarial image."""
    return shutil.copytree(finished, tmp_path / "run")


def request(tiny_zoo: Path | None = None, **changes: object) -> FrechetRequest:
    return FrechetRequest(**({"zoo": tiny_zoo, "device": "cpu"} | changes))  # type: ignore[arg-type]


def invoked(*arguments: object) -> Result:
    group = OneLineErrors("robbench", commands={"fid": fid})
    return CliRunner().invoke(group, ["fid", *map(str, arguments)])


def assert_one_line(result: Result, *parts: str) -> None:
    assert result.exit_code == 2, (result.exit_code, result.output, result.exception)
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1, result.stderr
    for part in parts:
        assert part in result.stderr


# ---------------------------------------------------------------------------------------------------------- values
def by_definition(module: nn.Sequential, images: torch.Tensor, reference: torch.Tensor) -> float:
    """|mu - nu|^2 + tr(A + B - 2 sqrt(AB)) by numpy.cov and scipy on the input of the last layer."""
    with torch.no_grad():
        a, b = (module[:-1](x).double().numpy() for x in (images, reference))
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    # A little of the identity keeps scipy's root of a singular product accurate; it moves the result by 1e-5.
    ridge = 1e-12 * np.eye(len(first))
    root = scipy.linalg.sqrtm((first + ridge) @ (second + ridge))
    shift = a.mean(axis=0) - b.mean(axis=0)
    return float(shift @ shift + np.trace(first) + np.trace(second) - 2 * np.trace(root).real)


def test_values_are_the_definition(run_folder: Path, tiny_zoo: Path, digits) -> None:
    records = score_run(run_folder, request(tiny_zoo, features="tiny-b"), Lines())
    run = load_run(run_folder)
    module = trained_classifier(1).eval()
    reference = torch.cat([split.x(torch.arange(len(split))) for split in (digits.train, digits.validation)])
    clean, _ = digits.test.by_ids(list(run.sample_ids))
    stored = [
        torch.from_numpy(
            np.stack([np.frombuffer(e, dtype="<f4").reshape(1, 8, 8) for e in cell.rows["example"]])
        )
        for cell in run.cells
    ]
    assert [r.attack for r in records] == ["clean", "fgsm", "pgd10"]
    for record, images in zip(records, [clean, *stored], strict=True):
        assert record.value == pytest.approx(by_definition(module, images, reference), rel=1e-4)
        assert (record.n, record.reference_n, record.status) == (N, REFERENCE_N, "ok")
        assert record.extractor == "frechet[tiny-b]"
    values = [record.value for record in records if record.value is not None]
    assert values[0] < min(values[1:])  # clean images are the floor
    assert load_frechet(run_folder) == records


def test_the_default_for_small_grey_images_is_the_standard_classifier(run_folder: Path) -> None:
    records = score_run(run_folder, request(), Lines())
    assert {record.extractor for record in records} == {"frechet[digits-standard]"}
    names = {(record.cell is None, record.model, record.attack) for record in records}
    assert names == {(True, None, "clean"), (False, "tiny-a", "fgsm"), (False, "tiny-a", "pgd10")}
    assert all(record.versions.items() >= versions().items() for record in records)


def test_an_attacked_extractor_is_noted(run_folder: Path, tiny_zoo: Path) -> None:
    records = score_run(run_folder, request(tiny_zoo, features="tiny-a"), Lines())
    assert ["aims at these features" in " ".join(record.notes) for record in records] == [False, True, True]


def test_few_images_are_a_note_with_the_numbers(tiny_zoo: Path, tmp_path: Path) -> None:
    run_matrix(run_request(tiny_zoo, n=20, attacks=("fgsm",)), tmp_path / "few")
    result = invoked(tmp_path / "few", "--zoo", tiny_zoo, "--features", "tiny-b")
    assert result.exit_code == 0
    assert "20 images for 64 features" in result.output
    assert all(len(record.notes) == 1 for record in load_frechet(tmp_path / "few"))


def test_a_cell_needs_only_sample_id_and_example(
    run_folder: Path, tiny_zoo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cells whose rows have another schema (an attacked flow's) score the same, whatever the order of rows."""
    expected = score_run(run_folder, request(tiny_zoo, features="tiny-b"), Lines())
    shutil.rmtree(run_folder / "frechet")

    def bare(folder: Path):
        run = load_run(folder)
        cells = [CellResult(c.cell, c.rows[["sample_id", "example"]].iloc[::-1]) for c in run.cells]
        return dataclasses.replace(run, cells=cells)

    monkeypatch.setattr(frechet, "load_run", bare)
    assert score_run(run_folder, request(tiny_zoo, features="tiny-b"), Lines()) == expected


# ---------------------------------------------------------------------------------------------------------- caches
def test_a_second_call_costs_nothing_and_a_new_cell_only_itself(
    run_folder: Path, tiny_zoo: Path, calls: list[int]
) -> None:
    chosen = request(tiny_zoo, features="tiny-b")
    first = score_run(run_folder, chosen, Lines())
    assert sum(calls) == REFERENCE_N + 3 * N
    assert max(calls) == 64
    calls.clear()
    assert score_run(run_folder, chosen, Lines()) == first
    assert calls == []
    run_matrix(run_request(tiny_zoo, attacks=("fgsm", "pgd10", "pgd20")), run_folder)
    again = score_run(run_folder, chosen, Lines())
    assert again[:3] == first
    assert sum(calls) == N


def test_another_run_uses_the_cached_reference(
    run_folder: Path, tiny_zoo: Path, cache: Path, calls: list[int]
) -> None:
    chosen = request(tiny_zoo, features="tiny-b")
    first = score_run(run_folder, chosen, Lines())
    calls.clear()
    shutil.rmtree(run_folder / "frechet")
    assert score_run(run_folder, chosen, Lines()) == first
    assert sum(calls) == 3 * N
    calls.clear()
    score_run(
        run_folder, request(tiny_zoo, features="tiny-a"), Lines()
    )  # another extractor, another reference
    assert sum(calls) == REFERENCE_N + 3 * N
    assert len(list(cache.glob("digits-*.npz"))) == 2


def test_a_damaged_cache_is_computed_again_with_a_message(
    run_folder: Path, tiny_zoo: Path, cache: Path, calls: list[int]
) -> None:
    chosen, lines = request(tiny_zoo, features="tiny-b"), Lines()
    first = score_run(run_folder, chosen, lines)
    assert lines.messages == []
    shutil.rmtree(run_folder / "frechet")
    (stored,) = cache.iterdir()
    stored.write_bytes(stored.read_bytes()[:1000])
    calls.clear()
    assert score_run(run_folder, chosen, lines) == first
    assert sum(calls) == REFERENCE_N + 3 * N
    (message,) = lines.messages
    assert str(stored) in message
    assert message.endswith("computed again")


def test_a_damaged_record_is_scored_again_with_a_message(
    run_folder: Path, tiny_zoo: Path, calls: list[int]
) -> None:
    chosen, lines = request(tiny_zoo, features="tiny-b"), Lines()
    first = score_run(run_folder, chosen, lines)
    (stored,) = (run_folder / "frechet").glob("clean-*.json")
    for content in ("{", "{}", "[1]"):
        stored.write_text(content)
        with pytest.raises(UserError, match=r"clean-.*\.json.*run robbench fid again"):
            load_frechet(run_folder)
        calls.clear()
        assert score_run(run_folder, chosen, lines) == first
        assert sum(calls) == N
    assert [message.endswith("scored again") for message in lines.messages] == 3 * [True]


# -------------------------------------------------------------------------------------------- what cannot be scored
def outcome(records: Sequence[FrechetRecord]) -> dict[str, tuple[str, bool, str]]:
    return {r.attack: (r.status, r.value is not None, r.reason) for r in records}


def test_without_all_examples_a_cell_is_not_run(tiny_zoo: Path, tmp_path: Path) -> None:
    run_matrix(run_request(tiny_zoo, n=30, keep_examples=16), tmp_path / "run")
    result = invoked(tmp_path / "run", "--zoo", tiny_zoo, "--features", "tiny-b")
    assert result.exit_code == 3
    assert result.output.count("not run") == 2
    assert "keeps 16 of 30 adversarial images; run it again with --keep-examples all --fresh" in result.output
    found = outcome(load_frechet(tmp_path / "run"))
    assert found["clean"] == ("ok", True, "")
    assert found["fgsm"][:2] == found["pgd10"][:2] == ("not run", False)
    run_matrix(run_request(tiny_zoo, n=30), tmp_path / "run", fresh=True)  # the next step helps
    assert invoked(tmp_path / "run", "--zoo", tiny_zoo, "--features", "tiny-b").exit_code == 0


def test_incomplete_and_failed_cells_are_not_run(run_folder: Path, tiny_zoo: Path) -> None:
    first, second = (entry.cell.hash for entry in load_run(run_folder).cells)
    next((run_folder / "cells" / first[:16]).glob("shard-0000-*.parquet")).unlink()
    ledger = Ledger(run_folder)
    record = ledger.read_cell(second)
    assert record is not None
    ledger.write_cell(record.model_copy(update={"status": "failed", "error": "no luck"}))
    found = outcome(score_run(run_folder, request(tiny_zoo, features="tiny-b"), Lines()))
    assert found["fgsm"][:2] == found["pgd10"][:2] == ("not run", False)
    assert "has 30 of 150 samples; run the same robbench run again" in found["fgsm"][2]
    assert "the cell failed (no luck)" in found["pgd10"][2]


class Poisoned(nn.Module):
    """A classifier whose features overflow to infinity for every image that no training image resembles."""

    def __init__(self) -> None:
        super().__init__()
        self.flatten, self.last = nn.Flatten(), nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        grid = (x * 16 - (x * 16).round()).abs().flatten(1).amax(1, keepdim=True)
        return self.last(self.flatten(x) / (grid < 1e-3))


def test_features_that_are_not_finite_fail_their_cell_alone(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, tiny_zoo: Path
) -> None:
    from robbench.run.features import PenultimateFeatures

    module = PenultimateFeatures(Poisoned(), "poisoned").eval()
    extractor = FeatureExtractor("frechet[poisoned]", "0" * 64, "1" * 64, module, torch.device("cpu"))
    monkeypatch.setattr(frechet, "classifier_extractor", lambda *_: extractor)
    found = outcome(score_run(run_folder, request(tiny_zoo, features="tiny-b"), Lines()))
    assert found["clean"][0] == "ok"
    for attack in ("fgsm", "pgd10"):
        assert found[attack][:2] == ("not run", False)
        assert "hold NaN or infinity" in found[attack][2]


# ----------------------------------------------------------------------------------------------------- reading back
def test_load_frechet_leaves_no_cell_blank(run_folder: Path, tiny_zoo: Path) -> None:
    assert load_frechet(run_folder) == []
    score_run(run_folder, request(tiny_zoo, features="tiny-b"), Lines())
    run_matrix(run_request(tiny_zoo, attacks=("pgd20", "fgsm")), run_folder)
    found = outcome(load_frechet(run_folder))
    assert set(found) == {"clean", "pgd20", "fgsm", "pgd10"}  # pgd10 is of the folder's first run
    assert found["pgd20"] == ("not run", False, "not scored yet; run robbench fid again")
    assert found["clean"][0] == found["fgsm"][0] == "ok"
    run_matrix(run_request(tiny_zoo, n=100, attacks=("pgd20", "fgsm")), run_folder)
    records = load_frechet(run_folder)
    assert {(record.status, record.n) for record in records} == {("not run", 100)}
    assert "scored for other samples" in outcome(records)["fgsm"][2]
    score_run(run_folder, request(tiny_zoo, features="tiny-a"), Lines())
    records = load_frechet(run_folder)
    assert [r.extractor for r in records] == 3 * ["frechet[tiny-a]"] + 3 * ["frechet[tiny-b]"]
    assert [r.status for r in records] == 3 * ["ok"] + 3 * ["not run"]


def test_a_record_is_a_value_or_a_reason(run_folder: Path, tiny_zoo: Path) -> None:
    record = score_run(run_folder, request(tiny_zoo, features="tiny-b"), Lines())[0]
    fields = record.model_dump()
    for changes in (
        {"value": None},
        {"reason": "?"},
        {"status": "not run"},
        {"value": float("nan")},
        {"value": -1},
    ):
        with pytest.raises(ValueError, match="FrechetRecord"):
            FrechetRecord(**(fields | changes))


# ----------------------------------------------------------------------------------------------------- command line
def test_the_table_says_what_was_measured(run_folder: Path, tiny_zoo: Path) -> None:
    result = invoked(run_folder, "--zoo", tiny_zoo, "--features", "tiny-b", "--batch-size", "1000")
    assert result.exit_code == 0, (result.output, result.exception)
    assert "frechet[tiny-b] to the 1,437 train+validation images of digits" in result.output
    for record in load_frechet(run_folder):
        assert f"{record.value:.4f}" in result.output
    assert f"JSON {run_folder / 'frechet'}" in result.output
    assert "digits train+validation: features of 1,437 images" in result.output


def test_wrong_use_is_one_line(
    run_folder: Path, tiny_zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*_: object, **__: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    assert_one_line(invoked(tmp_path / "nothing"), "nothing' is not a run folder", "robbench run")
    assert_one_line(invoked(tmp_path), "is not a run folder")
    assert_one_line(invoked(run_folder, "--features", "digits-standart"), "did you mean 'digits-standard'")
    assert_one_line(invoked(run_folder, "--features", "digits-glow"), "is a flow, not a classifier")
    assert_one_line(invoked(run_folder, "--features", "fashionmnist-at"), "(1, 28, 28), not (1, 8, 8)")
    assert_one_line(invoked(run_folder, "--features", ""), "the text is empty")
    assert_one_line(invoked(run_folder, "--batch-size", "0"), "--batch-size")
    assert_one_line(invoked(run_folder, "--device", "tpu"), "--device 'tpu'")
    inception = invoked(run_folder, "--features", "inception")
    assert_one_line(inception, "no network", "6726825d.pth", "https://", "--fid-weights FILE")
    weights = tmp_path / "w.pth"
    assert_one_line(invoked(run_folder, "--fid-weights", weights), "w.pth' is not a file")
    weights.write_text("no weights")
    assert_one_line(invoked(run_folder, "--fid-weights", weights), "does not hold the weights")
    both = invoked(run_folder, "--fid-weights", weights, "--features", "digits-standard")
    assert_one_line(both, "--fid-weights is for --features inception")
    assert not (run_folder / "frechet").exists()


def test_one_sample_has_no_covariance(tiny_zoo: Path, tmp_path: Path) -> None:
    run_matrix(run_request(tiny_zoo, n=1, attacks=("fgsm",)), tmp_path / "one")
    assert_one_line(invoked(tmp_path / "one"), "has 1 sample, and a covariance needs 2", "larger --n")


def test_other_data_than_the_runs_is_refused(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, digits
) -> None:
    changed = dataclasses.replace(digits, test=digits.test.subset(torch.arange(200)))
    monkeypatch.setattr(frechet, "load_dataset", lambda *_: changed)
    assert_one_line(invoked(run_folder), "was run on digits", "--data-dir")


def test_the_default_extractor_must_be_in_the_zoo(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frechet, "zoo_entries", lambda _extra: {})
    assert_one_line(invoked(run_folder), "no 'digits-standard'", "--features MODEL", "--features inception")


def test_a_reference_with_other_training_images_is_not_reused(
    run_folder: Path, tiny_zoo: Path, monkeypatch: pytest.MonkeyPatch, digits, calls: list[int]
) -> None:
    """The run's data revision covers the test images alone; the cache must not."""
    chosen = request(tiny_zoo, features="tiny-b")
    first = score_run(run_folder, chosen, Lines())
    changed = dataclasses.replace(digits, train=digits.train.subset(torch.arange(1000)))
    monkeypatch.setattr(frechet, "load_dataset", lambda *_: changed)
    calls.clear()
    other = score_run(run_folder, chosen, Lines())
    assert sum(calls) == 1000 + 180 + 3 * N
    assert all(a.value != b.value and b.reference_n == 1180 for a, b in zip(first, other, strict=True))


def test_a_model_folder_outside_the_zoo_is_an_extractor(run_folder: Path, tmp_path: Path) -> None:
    folder = saved_model(tmp_path / "own", "mine", trained_classifier(2, epochs=1))
    records = score_run(run_folder, request(features=str(folder)), Lines())
    assert {record.extractor for record in records} == {"frechet[mine]"}
