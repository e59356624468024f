"""The numbers of a run in an MLflow tracking store: one MLflow run a model. mlflow is an optional extra.

A model's MLflow run is found again by its tag `robbench.key`, the hash of everything its numbers depend on, so that a
second export changes what is there and adds nothing. A cell that failed or was not run has no metric, and is named in
the tags; docs/living.md lists metrics, parameters and tags.
"""

import hashlib
import logging
import math
import os
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from robbench.core.budget_limits import exact_text
from robbench.core.errors import UserError
from robbench.core.schema import canonical_hash, dump_yaml
from robbench.report.writers import tidy_csv
from robbench.results.rows import WORST_CASE, ModelResults, TableRow, models
from robbench.results.tables import leaderboard
from robbench.results.wording import measures
from robbench.store.frechet_records import samples_hash
from robbench.store.records import Run

if TYPE_CHECKING:
    from mlflow.entities import Run as StoredRun
    from mlflow.tracking import MlflowClient

KEY_TAG = "robbench.key"
MOST_AT_ONCE = 100  # parameters or tags MLflow takes in one call; of metrics it takes more
MOST_TEXT = 5000  # characters of a tag; MLflow takes 8,000, older ones 5,000
Status = Literal["FINISHED", "FAILED", "RUNNING"]
T = TypeVar("T")


@dataclass(frozen=True)
class Export:
    """What one model's MLflow run holds.

    Attributes:
        name: of the MLflow run.
        key: tells it from those of other models and runs.
        parameters: by name.
        metrics: by name.
        tags: by name.
        texts: artifacts by file name.
        status: FAILED when a cell failed, RUNNING when samples are missing.
    """

    name: str
    key: str
    parameters: dict[str, str]
    metrics: dict[str, float]
    tags: dict[str, str]
    texts: dict[str, str]
    status: Status


def export(run: Run, uri: str) -> list[str]:
    """Write every model of `run` to the MLflow store at `uri`; a line about each for the terminal.

    uri: what MLflow takes: sqlite:///mlflow.db, http://server:5000, postgresql://... Artifacts of a new experiment in
    an SQLite file go beside it, others where the server keeps them. `UserError` without mlflow, and for a store that
    cannot be reached or refuses.
    """
    _require_mlflow()
    _check(uri)
    exports = model_exports(run)
    try:
        return [_store(uri, run.dataset, exported) for exported in exports]
    except UserError:
        raise
    except Exception as error:  # the store's driver may raise anything; what is exported was made before
        reason = _without_password(" ".join(str(error).split())[:240]) or type(error).__name__
        raise UserError(
            f"--mlflow {_without_password(uri)!r}: MLflow refused ({reason}); "
            f"give an SQLite file (sqlite:///mlflow.db) or the http address of a tracking server"
        ) from error


def model_exports(run: Run) -> list[Export]:
    """The models of a run in plan order."""
    rows = leaderboard(run)
    return [_export(run, model, [row for row in rows if row.model == model.name]) for model in models(run)]


def _export(run: Run, model: ModelResults, rows: Sequence[TableRow]) -> Export:
    parameters = _parameters(run, model)
    statuses = {result.cell.status for result in model.cells}
    incomplete = any(len(result.rows) < run.n for result in model.cells)
    card = run.cards.get(model.name)
    return Export(
        name=model.name,
        key=canonical_hash(parameters),
        parameters=parameters,
        metrics=_metrics(rows),
        tags=_tags(run, rows),
        texts={"leaderboard.csv": tidy_csv(rows), **({"card.yaml": dump_yaml(card)} if card else {})},
        status="FAILED" if "failed" in statuses else "RUNNING" if incomplete else "FINISHED",
    )


def _parameters(run: Run, model: ModelResults) -> dict[str, str]:
    """Everything the numbers depend on: MLflow never changes a parameter."""
    cell = model.first.cell
    flow = cell.nll_flow
    names = _safe_names(result.cell.attack.label for result in model.cells)
    return {
        "dataset": run.dataset,
        "dataset_revision": run.dataset_revision,
        "seed": str(run.seed),
        "n": str(run.n),
        "samples_sha256": samples_hash(run.sample_ids),
        "model": model.name,
        "defense": cell.defense,
        "model_sha256": cell.model_sha256,
        "nll_flow": flow.name if flow else "none",
        "nll_flow_sha256": flow.sha256 if flow else "none",
        **{f"version/{_safe(name)}": version for name, version in run.versions.items()},
        **{f"cell/{names[r.cell.attack.label]}": r.cell.hash for r in model.cells},
    }


def _metrics(rows: Sequence[TableRow]) -> dict[str, float]:
    """ "accuracy/pgd20", with "accuracy_lower/pgd20" and "accuracy_upper/pgd20"; only what was measured, and finite. A
    partial worst case or average is none of them: MLflow would rank it with complete ones; its tag has the number."""
    names = _safe_names(_about(row) for row in rows)
    metrics: dict[str, float] = {}
    for row in rows:
        for suffix, value in (("", row.value), ("_lower", row.lower), ("_upper", row.upper)):
            if row.status == "ok" and value is not None and math.isfinite(value):
                metrics[f"{_safe(row.metric)}{suffix}/{names[_about(row)]}"] = value
    return metrics


def _about(row: TableRow) -> str:
    """What a number is about: an attack; of a worst case the attacks of which threat model and budgets."""
    if row.attack != WORST_CASE:
        return row.attack
    budgets = [exact_text(value) for value in (row.epsilon, row.eta) if value is not None]
    return "@".join([row.threat_model, *budgets])


def _tags(run: Run, rows: Sequence[TableRow]) -> dict[str, str]:
    """What a reader must know besides; empty where there is nothing, so that a second export clears what was there."""
    accuracies = [row for row in rows if row.kind.accuracy or row.status != "ok"]
    return {
        "robbench.failed": _join_notes(row for row in accuracies if row.status == "failed"),
        "robbench.partial": _join_notes(row for row in accuracies if row.status == "partial"),
        "robbench.not_run": _join_notes(row for row in accuracies if row.status == "not run"),
        "robbench.notes": _join_notes(row for row in accuracies if row.status == "ok" and row.note),
        "robbench.measures": measures(rows)[:MOST_TEXT],
        "robbench.run_notes": " ".join(run.notes)[:MOST_TEXT],
    }


def _join_notes(rows: Iterable[TableRow]) -> str:
    lines = dict.fromkeys(": ".join(filter(None, [_about(row), _partial(row), row.note])) for row in rows)
    return "\n".join(lines)[:MOST_TEXT]


def _partial(row: TableRow) -> str:
    """ "57.2 %" of a partial number, which no metric holds."""
    return f"{row.value:.1f} {row.unit}" if row.status == "partial" and row.value is not None else ""


def _safe(text: str) -> str:
    """With the characters alone that every MLflow takes in a name; a slash would start a folder."""
    return re.sub(r"[^A-Za-z0-9_. -]", "_", text)


def _safe_names(texts: Iterable[str]) -> dict[str, str]:
    """MLflow's name of each text; those that would fall together end in a hash of the text."""
    distinct = list(dict.fromkeys(texts))
    safe = [_safe(text) for text in distinct]
    return {
        text: name if safe.count(name) == 1 else f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"
        for text, name in zip(distinct, safe, strict=True)
    }


def _require_mlflow() -> None:
    """Import mlflow with its usage reports off, and impatient; `UserError` when it is not installed."""
    quiet = {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "MLFLOW_LOGGING_LEVEL": "WARNING",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    }
    for name, value in quiet.items():
        os.environ.setdefault(name, value)
    try:
        import mlflow.tracking  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"--mlflow needs mlflow, and it does not import ({error}); pip install 'robbench[mlflow]'"
        ) from error
    for name in ("mlflow", "alembic"):  # what they say about making tables is not for here
        logging.getLogger(name).setLevel(logging.WARNING)


def _check(uri: str) -> None:
    """`UserError` for what MLflow would only refuse after a long wait."""
    file = _sqlite_file(uri)
    if file is not None and not file.parent.is_dir():
        raise UserError(
            f"--mlflow {uri!r}: {str(file.parent)!r} is not a folder; make it, or name another file"
        )


def _sqlite_file(uri: str) -> Path | None:
    """The database file of an SQLite address; None for any other."""
    path = uri.partition("?")[0].removeprefix("sqlite:///")
    return Path(path).absolute() if uri.startswith("sqlite:///") and path else None


def _store(uri: str, dataset: str, exported: Export) -> str:
    """Write one model; a line about it."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    experiment = _experiment(client, uri, f"robbench {dataset}")
    stored = _find_run(client, experiment, exported)
    new = stored is None
    if stored is None:
        tags = {KEY_TAG: exported.key}
        stored = client.create_run(experiment, run_name=exported.name, tags=tags)
    run_id = stored.info.run_id
    _write(client, stored, exported)
    for name, text in exported.texts.items():
        client.log_text(run_id, text, name)
    client.update_run(run_id, status=exported.status)
    return f"{exported.name}: MLflow run {run_id}, {'new' if new else 'updated'}, {len(exported.metrics)} metrics"


def _experiment(client: "MlflowClient", uri: str, name: str) -> str:
    """Id of the experiment, made where it is absent."""
    found = client.get_experiment_by_name(name)
    if found is None:
        file = _sqlite_file(uri)
        place = None if file is None else (file.parent / "mlartifacts" / name.replace(" ", "-")).as_uri()
        return str(client.create_experiment(name, artifact_location=place))
    if found.lifecycle_stage == "deleted":
        raise UserError(
            f"--mlflow: the experiment {name!r} is deleted in that store; restore it there "
            f"(mlflow experiments restore --experiment-id {found.experiment_id}), or name another store"
        )
    return str(found.experiment_id)


def _find_run(client: "MlflowClient", experiment: str, exported: Export) -> "StoredRun | None":
    """The MLflow run of an earlier export, None without one. MLflow cannot take back a metric: a run with numbers that
    are no longer there (a cell that failed since) is deleted, as MLflow deletes: restorable."""
    for stored in client.search_runs([experiment], filter_string=f"tags.`{KEY_TAG}` = '{exported.key}'"):
        if set(stored.data.metrics) <= set(exported.metrics):
            return stored
        client.delete_run(stored.info.run_id)
    return None


def _write(client: "MlflowClient", stored: "StoredRun", exported: Export) -> None:
    """What differs from what is stored; metrics that are equal get no second entry in their history."""
    from mlflow.entities import Metric, Param, RunTag

    run_id, now, data = stored.info.run_id, int(time.time() * 1000), stored.data
    parameters = [Param(k, v) for k, v in exported.parameters.items() if k not in data.params]
    tags = [RunTag(k, v) for k, v in exported.tags.items() if data.tags.get(k, "") != v]
    metrics = [Metric(k, v, now, 0) for k, v in exported.metrics.items() if data.metrics.get(k) != v]
    for some in _parts(parameters):
        client.log_batch(run_id, params=some)
    for others in _parts(tags):
        client.log_batch(run_id, tags=others)
    for numbers in _parts(metrics):
        client.log_batch(run_id, metrics=numbers)


def _parts(values: Sequence[T]) -> Iterator[Sequence[T]]:
    for start in range(0, len(values), MOST_AT_ONCE):
        yield values[start : start + MOST_AT_ONCE]


def _without_password(text: str) -> str:
    """`text` without what stands before the @ of an address."""
    return re.sub(r"://[^/@\s]*@", "://***@", text)
