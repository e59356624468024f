"""Guarded classifiers in runs: what their rows say, which detectors are refused, and which fail their cell."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from detection_zoo import guarded_zoo, write_detector
from hypothesis import given
from hypothesis import strategies as st

from robbench.cli.app import main
from robbench.cli.run import run_matrix
from robbench.core.random import SampleRandom
from robbench.core.schema import canonical_hash
from robbench.detectors.base import Detector
from robbench.detectors.loading import load_detector
from robbench.metrics.detection import read_detection
from robbench.models.loading import load_model
from robbench.models.zoo import read_detector, read_entry, zoo_entries
from robbench.results.tables import leaderboard
from robbench.run.detection import noisy_images, pair_margin
from robbench.run.plan import build_plan
from robbench.run.request import RunRequest
from robbench.store.columns import LEDGER_COLUMNS
from robbench.store.ledger import load_run
from robbench.store.records import CellRecord, CellResult, Run

N = 20


@pytest.fixture(scope="module")
def zoo(tiny_zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """tiny-a and a few detectors of it; the other fixtures and tests add theirs."""
    with guarded_zoo(tiny_zoo, tmp_path_factory.mktemp("guarded")) as folder:
        yield folder


def request(
    zoo: Path, models: tuple[str, ...], attacks: tuple[str, ...] = ("fgsm",), **changes: object
) -> RunRequest:
    fields = {
        "models": models,
        "attacks": attacks,
        "zoo": zoo,
        "n": N,
        "device": "cpu",
        "threat_models": zoo / "specs",
    }
    return RunRequest(**(fields | changes))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def measured(zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """tiny-a without a detector, guarded by ones that flag nothing, everything, bright images and no number."""
    names = [
        write_detector(zoo, "zero"),
        write_detector(zoo, "mean", 0.3),
        write_detector(zoo, "nan", -1.0),
        write_detector(zoo, "infinite"),
    ]
    folder = tmp_path_factory.mktemp("measured") / "run"
    assert run_matrix(request(zoo, ("tiny-a", *names), ("pgd10", "deepfool-l2")), folder) == 0
    return load_run(folder)


def of(run: Run, model: str, attack: str = "pgd10") -> CellResult:
    return next(r for r in run.cells if (r.cell.model, r.cell.attack.label) == (model, attack))


@pytest.mark.parametrize("attack", ["pgd10", "deepfool-l2"])
@pytest.mark.parametrize("model", ["tiny-zero", "tiny-nan"])
def test_a_detector_that_flags_nothing_gives_the_numbers_of_the_plain_attack(
    measured: Run, model: str, attack: str
) -> None:
    plain, guarded = of(measured, "tiny-a", attack).rows, of(measured, model, attack)
    same = [column.name for column in LEDGER_COLUMNS["classifier"] if "margin" not in column.name]
    assert guarded.rows[same].equals(plain[same])
    assert (guarded.rows["margin"] > 0).equals(plain["margin"] > 0)
    assert (guarded.rows["clean_margin"] > 0).equals(plain["clean_margin"] > 0)
    assert guarded.rows["classifier_margin"].equals(plain["margin"].rename("classifier_margin"))
    numbers = {r.metric: r.value for r in leaderboard(measured) if (r.model, r.attack) == (model, attack)}
    accuracy = next(
        r.value
        for r in leaderboard(measured)
        if (r.model, r.attack, r.metric) == ("tiny-a", attack, "accuracy")
    )
    assert numbers["accuracy"] == numbers["bare_accuracy"] == accuracy
    assert numbers["acc_nadv"] == 100
    assert numbers["acc_com"] == pytest.approx(100 * (plain["margin"] > 0).mean())


def test_a_detector_that_flags_everything_has_robust_accuracy_0_and_acc_com_100(measured: Run) -> None:
    rows = of(measured, "tiny-infinite").rows
    assert not rows["robust"].any()
    assert set(rows["broken_by"]) == {"clean"}
    numbers = {(r.metric, r.attack): r.value for r in leaderboard(measured) if r.model == "tiny-infinite"}
    assert numbers["accuracy", "clean"] == numbers["accuracy", "pgd10"] == numbers["acc_nadv", "pgd10"] == 0
    assert numbers["acc_com", "pgd10"] == 100
    bare = {
        r.value for r in leaderboard(measured) if r.metric == "bare_accuracy" and r.attack == "deepfool-l2"
    }
    assert len(bare) == 1  # whoever guards it


def test_rows_are_what_classifier_and_detector_say_of_the_images(measured: Run, zoo: Path, digits) -> None:
    """Every column of the pair against a computation of its own, on all images."""
    result = of(measured, "tiny-mean")
    rows, ids = result.rows, result.rows["sample_id"].tolist()
    x, _ = digits.test.by_ids(ids)
    noise = SampleRandom(0, "detection noise").normal(ids, (1, 8, 8))
    noisy = (x + 0.1 * noise).clamp(0, 1)
    np.testing.assert_allclose(rows["clean_score"], x.double().flatten(1).mean(1), rtol=1e-12)
    np.testing.assert_allclose(rows["noisy_score"], noisy.double().flatten(1).mean(1), rtol=1e-12)
    found = read_detection(result)
    assert 0 < found.accepted.sum() < N
    right = (rows["clean_prediction"] == rows["label"]).to_numpy()
    assert ((rows["clean_margin"] > 0).to_numpy() == (right & (rows["clean_score"] <= 0.3))).all()
    held = ((rows["prediction"] == rows["label"]) | (rows["score"] > 0.3)).to_numpy()
    assert ((rows["margin"] > 0).to_numpy() == held).all()
    assert (rows["robust"] == ((rows["clean_margin"] > 0) & (rows["margin"] > 0))).all()
    assert (rows["broken_by"].isna() == rows["robust"]).all()
    kept = rows[rows["example"].notna()]
    images = np.stack([np.frombuffer(one, "<f4") for one in kept["example"]])
    np.testing.assert_allclose(kept["score"], images.astype(np.float64).mean(1), rtol=1e-9)


def test_an_adaptive_attack_is_given_the_detector_and_marks_nothing_as_oblivious(
    zoo: Path, tmp_path: Path
) -> None:
    name = write_detector(zoo, "mean", 0.3)
    models = ("tiny-a", name, write_detector(zoo, "zero"))
    assert run_matrix(request(zoo, models, ("fgsm", "knowing-pgd")), tmp_path) == 0
    run = load_run(tmp_path)
    kinds = [(r.cell.model, r.cell.attack.label, r.cell.kind, r.cell.is_adaptive) for r in run.cells]
    assert kinds == [
        ("tiny-a", "fgsm", "classifier", False),
        *(
            (model, label, "detector", label == "knowing-pgd")
            for model in models[1:]
            for label in ("fgsm", "knowing-pgd")
        ),
    ]
    rows = leaderboard(run)
    assert not any(row.oblivious for row in rows)
    # An attack that is for detectors alone is none that a plain classifier lacks.
    assert {row.status for row in rows} == {"ok"}


def test_without_an_adaptive_attack_every_number_of_the_attack_is_marked(measured: Run) -> None:
    rows = [row for row in leaderboard(measured) if row.detector and row.attack != "clean"]
    assert rows
    assert all(row.oblivious == row.kind.attacked for row in rows)
    assert not any(row.oblivious for row in leaderboard(measured) if row.model == "tiny-a")


def test_a_score_without_a_gradient_is_suspicious(measured: Run) -> None:
    texts = of(measured, "tiny-zero").cell.suspicions
    said = (
        "20 of 20 images have no gradient of the detector's score; adaptive attacks that follow it may fail"
    )
    assert said in texts
    assert not any("gradient of the detector" in text for text in of(measured, "tiny-mean").cell.suspicions)


@pytest.mark.parametrize(
    ("mode", "reason"),
    [
        ("order", "other scores in another order and other batches"),
        ("batch", "other scores in another order and other batches"),
        ("column", "returned [20, 1] torch.float64 for 20 images, not [20] float64"),
        ("float32", "returned [20] torch.float32 for 20 images"),
        ("list", "returned list for 20 images"),
        ("threshold", "changed while it was attacked or scored: its threshold is 1e+09, its card says 0.5"),
        ("drift", "changed while it was attacked or scored: the values of 'value' changed"),
        ("write", "writes into the images"),
        ("exit", "SystemExit"),
    ],
)
def test_a_detector_that_lies_fails_its_cell_alone(zoo: Path, tmp_path: Path, mode: str, reason: str) -> None:
    name = write_detector(zoo, mode)
    assert run_matrix(request(zoo, (name, "tiny-a")), tmp_path) == 1
    failed, plain = load_run(tmp_path).cells
    assert failed.cell.status == "failed"
    assert reason in (failed.cell.error or "")
    assert len(failed.rows) == 0
    assert failed.cell.clean is None  # the classifier's clean accuracy is not that of the pair
    assert plain.cell.status == "ok"


def invoked(zoo: Path, *arguments: object) -> Result:
    command = ["run", "--zoo", zoo, "--threat-models", zoo / "specs", "--n", N, "--device", "cpu", *arguments]
    return CliRunner().invoke(main, [str(part) for part in command], env={"COLUMNS": "300"})


@pytest.mark.parametrize(
    ("mode", "changes", "arguments", "reason"),
    [
        ("together", {}, (), "its scores depend on other images"),
        ("zero", {"input_shape": (1, 9, 9)}, (), "is a detector of images (1, 9, 9), its classifier"),
        ("zero", {"dataset": "mnist"}, (), "classifies mnist, not digits"),
        (
            "zero",
            {"classifier": {"name": "gone", "function_hash": "b" * 64}},
            (),
            "classifier 'gone', which is not",
        ),
        ("zero", {"classifier": {"name": "tiny-a", "function_hash": "b" * 64}}, (), "is another function"),
        ("zero", {"detector": "scripte"}, (), "unknown detector 'scripte'; did you mean 'scripted'?"),
        ("zero", {}, ("--model", "tiny-zer"), "did you mean 'tiny-zero'"),
        ("zero", {"name": "tiny-a"}, ("--model", "tiny-a"), "'tiny-a' is a model in"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(
    zoo: Path, tmp_path: Path, mode: str, changes: dict[str, object], arguments: tuple[str, ...], reason: str
) -> None:
    folder = Path(shutil.copytree(zoo, tmp_path / "zoo"))
    name = write_detector(folder, mode, **changes)
    result = invoked(
        folder, "--attacks", "fgsm", "--out", tmp_path / "out", *(arguments or ("--model", name))
    )
    assert result.exit_code == 2, result.output
    assert reason in result.output
    assert result.output.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_adaptive_attack_needs_a_guarded_model(zoo: Path, tmp_path: Path) -> None:
    result = invoked(zoo, "--model", "tiny-a", "--attacks", "knowing-pgd", "--out", tmp_path / "out")
    assert result.exit_code == 2, result.output
    assert "evades the detector that guards a classifier and no model here has one (tiny-a)" in result.output
    assert result.output.count("\n") == 1


def test_a_run_goes_on_where_it_was_and_a_folder_names_a_detector(zoo: Path, tmp_path: Path) -> None:
    write_detector(zoo, "mean", 0.3)
    given = str(zoo / "tiny-mean")
    assert run_matrix(request(zoo, (given,), n=10), tmp_path) == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("cells/*/shard-*")}
    assert run_matrix(request(zoo, (given,)), tmp_path) == 0
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in before.items())
    assert run_matrix(request(zoo, ("tiny-mean",)), tmp_path / "once") == 0
    again, once = load_run(tmp_path).cells[0], load_run(tmp_path / "once").cells[0]
    assert again.cell.hash == once.cell.hash
    columns = [c.name for c in LEDGER_COLUMNS["detector"] if c.kind in ("key", "class", "verdict", "step")]
    assert again.rows[columns].equals(once.rows[columns])


def test_halved_batches_give_the_same_rows(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = write_detector(zoo, "mean", 0.3)
    assert run_matrix(request(zoo, (name,)), tmp_path / "whole") == 0
    whole = type(_loaded(zoo, name)).scores

    def small(self: Detector, images: torch.Tensor, clean: torch.Tensor | None = None) -> torch.Tensor:
        if len(images) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(self, images, clean)

    monkeypatch.setattr(type(_loaded(zoo, name)), "scores", small)
    assert run_matrix(request(zoo, (name,)), tmp_path / "halved") == 0
    one, other = (load_run(tmp_path / place).cells[0] for place in ("whole", "halved"))
    assert one.rows["clean_score"].equals(other.rows["clean_score"])
    assert any("batch" in text for text in other.cell.suspicions)


def _loaded(zoo: Path, name: str) -> Detector:
    return load_detector(read_detector(zoo / name), load_model(read_entry(zoo / "tiny-a")))


def test_cells_without_a_detector_keep_their_address(measured: Run) -> None:
    """Addresses and function hashes as they were computed before there were detectors."""
    cell, card = of(measured, "tiny-a").cell, measured.cards["tiny-a"]
    old = {
        "model": card.function_hash,
        "attack_flow": None,
        "nll_flow": None,
        "attack": cell.attack.identity,
        "precision": cell.precision,
        "search_precision": cell.search_precision,
        "engine": cell.engine,
        "batch_size": cell.batch_size,
        "dataset": cell.dataset,
        "dataset_revision": cell.dataset_revision,
        "seed": cell.seed,
    }
    if cell.nll_flow is not None:
        old["nll_flow"] = zoo_entries()[cell.nll_flow.name].card.function_hash
    assert cell.hash == canonical_hash(old)
    assert "detector" not in card.model_dump(mode="json")
    record = cell.model_dump(mode="json")
    del record["detector"]
    assert CellRecord.model_validate(record) == cell


def test_threshold_and_noise_are_part_of_the_address(zoo: Path, tmp_path: Path) -> None:
    def address(**changes: object) -> str:
        name = write_detector(zoo, "mean", **changes)  # type: ignore[arg-type]
        return build_plan(request(zoo, (name,))).cells[0].record.hash

    noisier = {"name": "fgsm", "examples": 1, "mean_l2": 1.0, "noise_std": 0.2}
    found = [address(threshold=0.3), address(threshold=0.31), address(threshold=0.3, attacks=(noisier,))]
    assert len(set(found)) == 3
    assert address(threshold=0.3, description="another") == found[0]


@given(st.floats(-1e3, 1e3, width=32), st.floats(allow_nan=True), st.floats(-1e3, 1e3), st.booleans())
def test_the_pair_is_right_where_its_parts_are(
    margin: float, score: float, threshold: float, attacked: bool
) -> None:
    found = float(
        pair_margin(torch.tensor([margin]), torch.tensor([score], dtype=torch.float64), threshold, attacked)
    )
    flagged = score > threshold  # not for NaN
    assert (found > 0) == ((margin > 0 or flagged) if attacked else (margin > 0 and not flagged))


def test_noise_is_keyed_by_the_sample(digits) -> None:
    x, _ = digits.test.by_ids(digits.test.ids[:4].tolist())
    ids = digits.test.ids[:4].tolist()
    whole = noisy_images(x, ids, 7, 0.2)
    assert torch.equal(whole[2:3], noisy_images(x[2:3], ids[2:3], 7, 0.2))
    assert not torch.equal(whole, noisy_images(x, ids, 8, 0.2))
    assert whole.min() >= 0
    assert whole.max() <= 1
