"""Runs in a real MLflow store: its own client reads back what the tables say."""

import builtins
import csv
import io
import math
import sqlite3
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from publish_runs import attack, cell, frame, make_run

from robbench.cli.app import main
from robbench.core.errors import UserError
from robbench.report.mlflow_export import KEY_TAG, _safe_names, export, model_exports
from robbench.results.tables import leaderboard
from robbench.store.records import CellResult, Run

# MLflow 3.17 uses what SQLAlchemy 2.1 calls deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


# --------------------------------------------------------------------------------------- what is exported
def test_every_finite_number_of_the_tables_and_no_other(run: Run) -> None:
    exports = {exported.name: exported for exported in model_exports(run)}
    rows = [row for row in leaderboard(run) if row.model in exports and row.value is not None]
    assert set(exports) == {"digits-standard", "digits-ijsat"}
    assert sum(len(exported.metrics) for exported in exports.values()) == sum(
        math.isfinite(value)
        for row in rows
        for value in (row.value, row.lower, row.upper)
        if value is not None
    )
    for row in rows:
        about = row.attack
        if row.attack == "worst-case":
            about = {"linf": "linf_0.2", "joint": "joint_0.2_0.35", "all": "all"}[row.threat_model]
        metrics = exports[row.model].metrics
        assert metrics[f"{row.metric}/{about}"] == row.value
        assert metrics.get(f"{row.metric}_lower/{about}") == row.lower
        assert metrics.get(f"{row.metric}_upper/{about}") == row.upper
    assert exports["digits-ijsat"].status == "FINISHED"


def test_what_failed_or_was_not_run_has_no_metric_and_a_reason(damaged: Run) -> None:
    exports = {exported.name: exported for exported in model_exports(damaged)}
    failed, half = exports["digits-ijsat"], exports["digits-standard"]
    assert (failed.status, half.status) == ("FAILED", "RUNNING")
    assert "accuracy/pgd20" in failed.metrics
    for exported, gone in ((failed, "aa"), (half, "jsa50")):
        names = {
            f"{metric}/{about}" for metric in ("accuracy", "bits_per_dim_after", "l2") for about in (gone,)
        }
        names |= {"worst_case_accuracy/all", "average_accuracy/average"}
        assert not names & set(exported.metrics)
    assert "aa: attack 'aa' left its set" in failed.tags["robbench.failed"]
    assert "all: aa failed" in failed.tags["robbench.failed"]
    assert "jsa50: 50 of 120 samples done" in half.tags["robbench.not_run"]
    assert half.tags["robbench.failed"] == ""


def test_a_key_is_that_of_everything_the_numbers_depend_on(run: Run) -> None:
    first = [exported.key for exported in model_exports(run)]
    assert [exported.key for exported in model_exports(run)] == first
    assert len(set(first)) == 2
    elsewhere = replace(run, folder=Path("/somewhere/else"))
    assert [exported.key for exported in model_exports(elsewhere)] == first
    changed = [
        replace(run, seed=4),
        replace(run, dataset_revision="e" * 64),
        replace(run, versions={"robbench": "9"}),
    ]
    changed.append(replace(run, sample_ids=tuple(i + 1 for i in run.sample_ids)))
    changed.append(make_run(run.cells[:2] + run.cells[3:5], run.n))
    for other in changed:
        assert not set(first) & {exported.key for exported in model_exports(other)}


def test_names_mlflow_takes_stay_different() -> None:
    names = _safe_names(["pgd20@8/255", "pgd20@8@255", "pgd20@eta0.5", "aa", "µ"])
    assert len(set(names.values())) == 5
    assert names["aa"] == "aa"
    assert names["pgd20@eta0.5"] == "pgd20_eta0.5"
    assert names["pgd20@8/255"].startswith("pgd20_8_255-")
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789_.- ") for name in names.values())


def test_without_mlflow_the_extra_is_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *arguments: Any) -> Any:
        if name.split(".")[0] == "mlflow":
            raise ModuleNotFoundError("No module named 'mlflow'")
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(UserError, match=r"pip install 'robbench\[mlflow\]'"):
        export(run, "sqlite:///x.db")


# ----------------------------------------------------------------------------------------------- a real store
@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an SQLite store in it: MLflow takes seconds to make its tables."""
    pytest.importorskip("mlflow", reason="pip install 'robbench[mlflow]'")
    pytest.importorskip("sqlalchemy", reason="pip install 'robbench[mlflow]'")
    folder = tmp_path_factory.mktemp("mlflow")
    from robbench.report import mlflow_export

    mlflow_export._require_mlflow()
    from mlflow.tracking import MlflowClient

    MlflowClient(tracking_uri=f"sqlite:///{folder / 'empty.db'}").search_experiments()
    return folder


@pytest.fixture
def uri(store: Path, tmp_path: Path) -> str:
    """An empty store of its own."""
    (tmp_path / "mlflow.db").write_bytes((store / "empty.db").read_bytes())
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


def stored_runs(uri: str, deleted: bool = False) -> list[Any]:
    from mlflow.entities import ViewType
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("robbench digits")
    view = ViewType.DELETED_ONLY if deleted else ViewType.ACTIVE_ONLY
    return sorted(
        client.search_runs([experiment.experiment_id], run_view_type=view), key=lambda r: r.info.run_name
    )


def history(uri: str) -> int:
    """Metric entries in the database, those of the past too."""
    with sqlite3.connect(uri.removeprefix("sqlite:///")) as database:
        return int(database.execute("select count(*) from metrics").fetchone()[0])


def test_the_store_has_parameters_metrics_tags_and_artifacts(run: Run, uri: str, tmp_path: Path) -> None:
    lines = export(run, uri)
    assert len(lines) == 2
    assert all(", new, " in line for line in lines)
    ijsat, standard = stored_runs(uri)
    assert (ijsat.info.run_name, ijsat.info.status) == ("digits-ijsat", "FINISHED")
    exported = {e.name: e for e in model_exports(run)}
    assert ijsat.data.metrics == exported["digits-ijsat"].metrics
    assert ijsat.data.params == exported["digits-ijsat"].parameters
    assert standard.data.params["cell/aa"] == run.cells[1].cell.hash
    assert standard.data.params["model_sha256"] == run.cells[0].cell.model_sha256
    assert standard.data.params["version/torch"] == "2.8.0"
    assert ijsat.data.tags[KEY_TAG] == exported["digits-ijsat"].key
    place = next((tmp_path / "mlartifacts").glob(f"*/{ijsat.info.run_id}"))
    rows = list(csv.DictReader(io.StringIO((place / "artifacts" / "leaderboard.csv").read_text())))
    assert len(rows) == len([row for row in leaderboard(run) if row.model == "digits-ijsat"])
    assert "name: digits-ijsat" in (place / "artifacts" / "card.yaml").read_text()


def test_a_second_export_adds_nothing_and_a_changed_number_is_updated(
    damaged: Run, run: Run, uri: str
) -> None:
    export(damaged, uri)
    first, entries = stored_runs(uri), history(uri)
    assert {r.info.run_name: r.info.status for r in first} == {
        "digits-ijsat": "FAILED",
        "digits-standard": "RUNNING",
    }
    assert all(", updated, " in line for line in export(damaged, uri))
    assert history(uri) == entries
    export(run, uri)  # the same cells, complete now
    second = stored_runs(uri)
    assert [r.info.run_id for r in second] == [r.info.run_id for r in first]
    assert [r.info.status for r in second] == ["FINISHED", "FINISHED"]
    assert [r.data.metrics for r in second] == [
        e.metrics for e in sorted(model_exports(run), key=lambda e: e.name)
    ]
    assert not any(r.data.tags.get("robbench.failed") for r in second)


def test_a_number_that_is_gone_is_not_left_in_the_store(damaged: Run, run: Run, uri: str) -> None:
    export(run, uri)
    before = {r.info.run_name: r.info.run_id for r in stored_runs(uri)}
    export(damaged, uri)
    after = stored_runs(uri)
    assert "accuracy/aa" not in after[0].data.metrics
    assert {r.info.run_name for r in after} == {*before}
    assert {r.info.run_id for r in stored_runs(uri, deleted=True)} == {*before.values()}


def test_many_attacks_and_odd_names(uri: str) -> None:
    """More parameters than MLflow takes in one call, and labels with characters it takes nowhere."""
    cells = [
        cell("<b>digits</b> ünï/code", attack(f"pgd20@{k}/255", epsilon=k / 255), frame(20, 0.9, 0.5, k))
        for k in range(1, 121)
    ]
    run = make_run([CellResult(r.cell.model_copy(update={"nll_flow": None}), r.rows) for r in cells], 20)
    export(run, uri)
    (stored,) = stored_runs(uri)
    assert stored.data.metrics == model_exports(run)[0].metrics
    assert stored.data.metrics["accuracy/pgd20_8_255"] == pytest.approx(100 * cells[7].rows["robust"].mean())
    assert sum(name.startswith("cell/") for name in stored.data.params) == 120


def test_the_command(run: Run, uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("robbench.cli.report._open", lambda _: nullcontext([run]))
    monkeypatch.setattr("robbench.cli.report._write_tables", lambda *_: None)
    result = CliRunner().invoke(main, ["report", "RUN", "--mlflow", uri])
    assert result.exit_code == 0, result.output
    stored = {r.info.run_name: r.info.run_id for r in stored_runs(uri)}
    assert [line.split(",")[0] for line in result.stdout.splitlines()] == [
        f"{name}: MLflow run {stored[name]}" for name in ("digits-standard", "digits-ijsat")
    ]


@pytest.mark.parametrize(
    ("bad", "part"),
    [
        ("nonsense:///x", "nonsense:///x"),
        ("sqlite:////does/not/exist/mlflow.db", "is not a folder; make it"),
        ("postgresql://me:secret@127.0.0.1:1/x", "postgresql://"),
        ("http://127.0.0.1:9", "give an SQLite file"),
    ],
)
def test_a_store_that_cannot_be_reached_is_one_line(
    run: Run, store: Path, bad: str, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(UserError) as error:
        export(run, bad)
    text = str(error.value)
    assert text.startswith("--mlflow ")
    assert part in text
    assert "\n" not in text
    assert "secret" not in text


def test_a_file_that_is_no_store_stays_as_it_is(run: Run, store: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.db").write_text("not a database, and longer than nothing")
    with pytest.raises(UserError, match="MLflow refused"):
        export(run, f"sqlite:///{tmp_path / 'notes.db'}")
    assert (tmp_path / "notes.db").read_text() == "not a database, and longer than nothing"
    assert [path.name for path in tmp_path.iterdir()] == ["notes.db"]


def test_a_deleted_experiment_says_how_to_restore_it(run: Run, uri: str) -> None:
    from mlflow.tracking import MlflowClient

    export(run, uri)
    client = MlflowClient(tracking_uri=uri)
    client.delete_experiment(client.get_experiment_by_name("robbench digits").experiment_id)
    with pytest.raises(UserError, match="mlflow experiments restore"):
        export(run, uri)
