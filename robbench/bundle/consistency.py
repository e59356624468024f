"""Consistency of the columns of a ledger's rows with each other. Needs no model and no data.

The rules are those of `attacks.base.Attack` and `attacks.likelihood.LikelihoodAttack`, which never write a row that
breaks one. A consistent row may still be false, which only a model reveals (`rescore`, `rerun`).
"""

from collections.abc import Iterator

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from robbench.attacks.search.constraints import BALL_TOLERANCE
from robbench.bundle.findings import Finding, judge
from robbench.metrics.verdicts import floats, is_beyond_budget
from robbench.results.rows import models
from robbench.run.detection import ROUNDING as SCORE_ROUNDING
from robbench.run.detection import pair_margin
from robbench.store.columns import LEDGER_COLUMNS, select_names
from robbench.store.records import CellRecord, CellResult, Run

Mask = NDArray[np.bool_]
Floats = NDArray[np.float64]

ROUNDING = 1e-4  # tolerance of float32 norms and cross-entropies, relative above 1
CHECK = "rows"


def consistency_findings(run: Run) -> Iterator[Finding]:
    """One finding per cell, then one per model whose cells contradict each other."""
    for result in run.cells:
        cell, rows = result.cell, result.rows
        problems = [*_samples(run, cell, rows), *_identity(run, cell)]
        rules = _classifier_rules(run, result) if cell.decides else _flow_rules(run, result)
        problems += [_count_rows(rows, mask, text) for text, mask in rules if mask.any()]
        yield judge(cell.model, cell.attack.label, CHECK, len(rows), problems)
    for model in models(run):
        if problems := _check_shared(model.cells):
            yield judge(model.name, "", CHECK, sum(len(r.rows) for r in model.cells), problems)


def names_classes(run: Run, result: CellResult) -> bool:
    """Whether labels and predictions of a cell are classes of the data set."""
    return not any(mask.any() for _, mask in _label_rules(bare_rows(result), len(run.class_names)))


def bare_rows(result: CellResult) -> pd.DataFrame:
    """The rows of a guarded classifier with the margins of the classifier alone; of any other cell as they are."""
    if result.cell.detector is None:
        return result.rows
    own = {name: result.rows[f"{name}classifier_margin"] for name in ("clean_", "")}
    return result.rows.assign(**{f"{name}margin": column for name, column in own.items()})


def incomplete(run: Run) -> list[str]:
    """Cells without all their rows, with what is the matter: their numbers are in no table."""
    texts = []
    for result in run.cells:
        cell = result.cell
        if cell.clean is not None:
            texts.append(f"{cell.model} x {cell.attack.label} states a clean accuracy that no row stands for")
        if cell.status == "failed":
            texts.append(f"{cell.model} x {cell.attack.label} failed: {cell.error or 'no reason recorded'}")
        elif len(result.rows) < run.n:
            texts.append(f"{cell.model} x {cell.attack.label} has {len(result.rows)} of {run.n} samples")
    return texts


def duplicate_labels(run: Run) -> list[str]:
    """Remarks on cells of one model with several labels, which averages count several times."""
    labels: dict[tuple[str, str], list[str]] = {}
    for cell in (result.cell for result in run.cells):
        labels.setdefault((cell.model, cell.hash), []).append(cell.attack.label)
    return [
        f"{model}: {', '.join(names)} are one attack; averages count it {len(names)} times"
        for (model, _), names in labels.items()
        if len(names) > 1
    ]


def _count_rows(rows: pd.DataFrame, mask: Mask, text: str) -> str:
    first = int(rows["sample_id"].to_numpy()[mask][0])
    return f"{int(mask.sum())} of {len(rows)} rows: {text} (first sample {first})"


def _samples(run: Run, cell: CellRecord, rows: pd.DataFrame) -> list[str]:
    if cell.status == "ok" and len(rows) != run.n:
        return [f"status is ok with {len(rows)} of {run.n} rows"]
    return []


def _identity(run: Run, cell: CellRecord) -> list[str]:
    """Differences between the record of a cell and the run or the card of its model."""
    card = run.cards[cell.model]
    pairs = (
        ("data set", cell.dataset, run.dataset),
        ("data set revision", cell.dataset_revision[:12], run.dataset_revision[:12]),
        ("seed", cell.seed, run.seed),
        ("weights", cell.model_sha256[:12], card.weights.sha256[:12]),
        ("defense", cell.defense, card.defense),
        ("kind of model", cell.kind, card.kind),
        ("detector", cell.detector, card.detector.reference if card.detector else None),
    )
    return [f"{what} {mine} in the cell, {its} in the bundle" for what, mine, its in pairs if mine != its]


def _check_shared(cells: tuple[CellResult, ...]) -> list[str]:
    """Contradictions between a model's cells on the same clean samples."""
    numbers = [name for name in ("clean_margin", "clean_score", "noisy_score") if name in cells[0].rows]
    names = ["label", *numbers]
    together = pd.concat([result.rows[["sample_id", *names]] for result in cells])
    groups = together.groupby("sample_id")
    problems = []
    labels = int((groups["label"].nunique() > 1).sum())
    if labels:
        problems.append(f"{labels} samples have another label in another cell")
    for name in numbers:
        spread = groups[name].agg(["min", "max"])
        allowed = ROUNDING if name == "clean_margin" else SCORE_ROUNDING
        far = (spread["max"] - spread["min"]) > allowed * np.maximum(1.0, spread["max"].abs())
        if count := int(far.sum()):
            problems.append(f"{count} samples have another {name.replace('_', ' ')} in another cell")
    return problems


Rules = Iterator[tuple[str, Mask]]


def _classifier_rules(run: Run, result: CellResult) -> Rules:
    cell, rows = result.cell, result.rows
    classes = len(run.class_names)
    yield from _label_rules(bare_rows(result), classes)
    yield from _margin_rules(bare_rows(result), classes)
    yield from _detection_rules(cell, rows)
    clean_right, right = floats(rows["clean_margin"]) > 0, floats(rows["margin"]) > 0
    robust = rows["robust"].to_numpy(dtype=np.bool_)
    right |= is_beyond_budget(result)
    yield "robust contradicts the margins", robust != (clean_right & right)
    yield from _break_rules(cell, rows, robust, clean_right)
    yield from _size_rules(cell, rows, run)
    yield from _count_rules(cell, rows)
    yield from _likelihood_rules(cell, rows)
    yield from _target_rules(cell, rows)


def _detection_rules(cell: CellRecord, rows: pd.DataFrame) -> Rules:
    """The margins of a guarded classifier follow from the classifier's, the scores and the threshold."""
    if cell.detector is None:
        return
    for name, attacked in (("clean_", False), ("", True)):
        own, score = (
            torch.from_numpy(floats(rows[f"{name}{part}"]).copy()) for part in ("classifier_margin", "score")
        )
        found = pair_margin(own, score, cell.detector.threshold, attacked).numpy()
        said = floats(rows[f"{name}margin"])
        yield (
            f"{name}margin contradicts the scores",
            ~np.isclose(found, said, rtol=ROUNDING, atol=0, equal_nan=True),
        )
    margin, right = (
        floats(rows["noisy_classifier_margin"]),
        (rows["noisy_prediction"] == rows["label"]).to_numpy(),
    )
    wrong = np.isnan(margin) | ((margin > 0) & ~right) | ((margin < 0) & right)
    yield "noisy_prediction contradicts noisy_classifier_margin", wrong


def _target_rules(cell: CellRecord, rows: pd.DataFrame) -> Rules:
    """A targeted attack's rows have a target, and it is reached where it is the prediction and not the label."""
    if "target" not in rows:
        return
    there = rows["target"].notna()
    aimed = cell.attack.parameters.get("target") is not None
    yield "target is missing, or there without a targeted attack", (there != aimed).to_numpy(dtype=np.bool_)
    reached = (rows["prediction"] == rows["target"]) & (rows["label"] != rows["target"])
    said = rows["reached"].fillna(False).astype(bool)
    yield "reached contradicts prediction and target", (there & (said != reached)).to_numpy(dtype=np.bool_)


def _label_rules(rows: pd.DataFrame, classes: int) -> Rules:
    for name in select_names("class"):
        if name in rows:
            own = {"prediction": "", "noisy_prediction": "noisy_classifier_"}.get(name)
            least = 0 if own is None else np.where(_not_finite(rows, own), -1, 0)
            values = rows[name]
            outside = ~((values >= least) & (values < classes))
            yield f"{name} is no class", (outside & values.notna()).to_numpy(dtype=np.bool_)


def _not_finite(rows: pd.DataFrame, of: str = "") -> Mask:
    """Attacked images, or noisy ones, whose logits are not finite: margin -inf, prediction -1, an infinite
    cross-entropy. of: prefix of the margin."""
    if f"{of}margin" not in rows:
        return np.zeros(len(rows), dtype=np.bool_)
    prediction = rows[f"{of.removesuffix('classifier_')}prediction"].to_numpy()
    return np.asarray(np.isneginf(floats(rows[f"{of}margin"])) & (prediction == -1))


def _margin_rules(rows: pd.DataFrame, classes: int) -> Rules:
    """A positive margin is a right prediction, a negative one a wrong prediction; a tie may be either."""
    label = rows["label"].to_numpy()
    for margin_name, prediction_name in (("clean_margin", "clean_prediction"), ("margin", "prediction")):
        margin, right = floats(rows[margin_name]), rows[prediction_name].to_numpy() == label
        allowed = _not_finite(rows) if margin_name == "margin" else np.zeros(len(rows), dtype=np.bool_)
        yield f"{margin_name} is not finite", ~np.isfinite(margin) & ~allowed
        yield (
            f"{prediction_name} contradicts {margin_name}",
            ((margin > 0) & ~right) | ((margin < 0) & right),
        )
    entropy, margin = floats(rows["cross_entropy"]), floats(rows["margin"])
    with np.errstate(invalid="ignore"):
        lowest = np.logaddexp(0.0, -margin)  # where all further logits are far below the largest other one
        highest = np.logaddexp(0.0, np.log(max(classes - 1, 1)) - margin)  # where all equal it
        slack = ROUNDING * np.maximum(1.0, np.abs(margin))
        outside = ~((entropy >= lowest - slack) & (entropy <= highest + slack))
    outside = np.where(_not_finite(rows), ~np.isposinf(entropy), outside)
    yield "cross_entropy is impossible with margin", outside


def _break_rules(cell: CellRecord, rows: pd.DataFrame, robust: Mask, clean_right: Mask) -> Rules:
    by, step = rows["broken_by"], rows["broken_at"].to_numpy()
    unnamed = by.isna().to_numpy(dtype=np.bool_)
    yield "broken_by contradicts robust", unnamed != robust
    yield "broken_by contradicts clean_margin", ~robust & ((by == "clean").to_numpy() != ~clean_right)
    components = cell.attack.parameters.get("components")
    names = {*(components if isinstance(components, (list, tuple)) else ()), cell.attack.name, "clean"}
    yield "broken_by names no part of the attack", ~unnamed & ~by.isin(names).to_numpy(dtype=np.bool_)
    yield "broken_at contradicts robust", np.where(robust, step != -1, step < 0)
    yield "broken_at contradicts clean_margin", ~robust & ~clean_right & (step != 0)
    last = np.array([cell.attack.last_step(name) for name in by.fillna("")])
    limit = np.where(np.isnan(last), rows["forwards"].to_numpy(), last)
    yield "broken_at is beyond the steps of the attack", ~robust & clean_right & (step > limit)


def _likelihood_rules(cell: CellRecord, rows: pd.DataFrame) -> Rules:
    scores = [column.name for column in LEDGER_COLUMNS["classifier"] if column.unit == "bits/dim"]
    for name in scores if cell.nll_flow is None else ():
        yield f"{name} is there without a flow", rows[name].notna().to_numpy(dtype=np.bool_)


def _flow_rules(run: Run, result: CellResult) -> Rules:
    rows = result.rows
    yield from _label_rules(rows, len(run.class_names))
    yield from _size_rules(result.cell, rows, run)
    yield from _count_rules(result.cell, rows)
    before, after = floats(rows["nll_before"]), floats(rows["nll_after"])
    same = np.isclose(before, after, rtol=ROUNDING, atol=ROUNDING, equal_nan=True)
    yield "nll_after differs although nothing moved", (floats(rows["linf"]) == 0) & ~same


def _size_rules(cell: CellRecord, rows: pd.DataFrame, run: Run) -> Rules:
    """Norms are finite, ordered (linf <= l2 <= l1 <= D linf), and for image attacks within the budget."""
    sizes = {name: floats(rows[name]) for name in ("l1", "l2", "linf")}
    l1, l2, linf = (sizes[name] for name in ("l1", "l2", "linf"))
    dimensions = int(np.prod(run.shape))
    finite = np.logical_and.reduce([np.isfinite(size) for size in sizes.values()])
    yield "a distance is not finite", ~finite
    slack = 1 + ROUNDING
    ordered = (linf >= 0) & (linf <= l2 * slack + 1e-6) & (l2 <= l1 * slack + 1e-6)
    yield "distances contradict each other", finite & ~(ordered & (l1 <= dimensions * linf * slack + 1e-6))
    yield "a pixel moved further than the pixel range", finite & (linf > 1 + BALL_TOLERANCE)
    if "l0" in rows:  # null in old shards
        l0 = floats(rows["l0"])
        fits = (l0 <= dimensions) & ((l0 == 0) == (linf == 0)) & (l1 <= l0 * linf * slack + 1e-6)
        yield "l0 contradicts the other distances", finite & ~np.isnan(l0) & ~fits
    attack = cell.attack
    if attack.space == "image" and attack.norm != "none":
        allowed = attack.radius + BALL_TOLERANCE * max(1.0, attack.radius)
        yield (
            f"{attack.norm} is beyond the budget {attack.radius:g}",
            finite & ~(sizes[attack.norm] <= allowed),
        )


def _count_rules(cell: CellRecord, rows: pd.DataFrame) -> Rules:
    for name in select_names("count", target=cell.attack.target):
        yield f"{name} is negative", rows[name].to_numpy() < 0
