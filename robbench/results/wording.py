"""Sentences and number formats that terminal, Markdown and HTML share."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from robbench.core.counting import count_noun
from robbench.results.parity import parity_note
from robbench.results.rows import AVERAGE, CLEAN, OBLIVIOUS, WORST_CASE, TableRow, models
from robbench.specs import Measure, ModelKind
from robbench.store.records import CellRecord, Run

INTERVALS = (
    "95 % intervals: Wilson score for accuracies, bootstrap over samples for the average (unweighted mean of "
    "clean and all attacks, by what their columns show). Worst case: a sample counts as correct only if it is right "
    "without attack and no attack broke it; perturbations, which are no adversaries, are not part of it."
)
MEANINGS: dict[Measure, str] = {
    "robust accuracy": "right on the clean image and under attack",
    "accuracy under attack": "right on the attacked image; all images are perturbed, misclassified ones too",
}
REJECTION = (
    " Of a guarded classifier it is accuracy with rejection: an image without attack must be accepted too, and an "
    "attacked one may be flagged instead."
)
ANY_ITERATE = (
    "A search that stops early counts an image as broken by any of its iterates, papers by the last one: accuracies "
    "under attack are 0 to 0.8 points lower here for it."
)
NAMED = 5  # attacks that a note on a partial number names; leaderboard.csv names all


def measures(rows: Iterable[TableRow]) -> str:
    """Which accuracy the columns of which attacks show, as sentences."""
    rows = list(rows)
    guarded = REJECTION if any(row.detector for row in rows) else ""
    shown: dict[str, dict[str, None]] = {}
    for row in rows:
        if row.metric in ("accuracy", "corruption_accuracy") and row.measure in MEANINGS:
            shown.setdefault(row.measure, {})[row.attack] = None
    told = {measure: meaning for measure, meaning in MEANINGS.items() if measure in shown}
    if len(told) == 1:  # of every attack, so that none is named
        return "".join(f"{measure.capitalize()}: {meaning}." for measure, meaning in told.items()) + guarded
    return (
        " ".join(f"{key.capitalize()} ({meaning}): {', '.join(shown[key])}." for key, meaning in told.items())
        + guarded
    )


def number_text(row: TableRow | None) -> str:
    """The value with the decimals of its metric, a star where samples were left out; a dash where it is missing."""
    if row is None or row.value is None:
        return "-" if row is None or not row.note else "none finite"
    digits = f"{row.value:.{row.kind.decimals}f}" if abs(row.value) < 1e4 else f"{row.value:.3e}"
    return digits + ("*" if row.left_out else "")


def summary(run: Run, kind: ModelKind | None = None) -> str:
    """Numbers of models, attacks and samples, with `kind` of classifiers or flows only, and the parity notes."""
    cells = [result.cell for model in models(run) if kind in (None, model.kind) for result in model.cells]
    named = len({cell.model for cell in cells})
    attacks = len({cell.attack.label for cell in cells})
    counts = [count_noun(named, "model"), count_noun(attacks, "attack"), f"n = {run.n} test images"]
    noted = [f"{note}." for note in run.notes]
    return " ".join([*noted, f"{', '.join(counts)}, seed {run.seed}.", *_engines(cells)])


def _engines(cells: Sequence[CellRecord]) -> list[str]:
    """ "aa, aa-l2: robbench aa, parity table v1." """
    labels: dict[str, dict[str, None]] = {}
    for cell in cells:
        if note := parity_note(cell):
            labels.setdefault(note, {})[cell.attack.label] = None
    return [f"{', '.join(attacks)}: {note}." for note, attacks in labels.items()]


def versions(run: Run) -> str:
    """ "robbench 0.1.0, torch 2.8.0", as recorded by the run."""
    return ", ".join(f"{name} {version}" for name, version in run.versions.items())


def problems(rows: Sequence[TableRow]) -> list[str]:
    """Problems of single numbers: worst cases and averages that leave out attacks, failures, missing parts, near ties,
    left-out values; then suspicions about models, each once for all its attacks."""
    single = [row for row in rows if row.attack not in (WORST_CASE, AVERAGE)]
    kept = [row for row in single if _is_problem(row)]
    plain = (replace(row, oblivious=False) for row in kept)  # which has a line of its own
    lines = [f"{row.model}, {row.attack}, {row.metric.replace('_', ' ')}: {_reason(row)}" for row in plain]
    return [*_partial(rows), *lines, *_oblivious(rows), *_suspicions(single)]


def _oblivious(rows: Sequence[TableRow]) -> list[str]:
    """A line per guarded classifier that no adaptive attack was run on."""
    return [f"{name}: {OBLIVIOUS}" for name in dict.fromkeys(row.model for row in rows if row.oblivious)]


def _partial(rows: Sequence[TableRow]) -> list[str]:
    """A line per model that was not run under all attacks of the table, from its combined number that lacks most."""
    widest: dict[str, TableRow] = {}
    for row in rows:
        known = widest.get(row.model)
        if row.status == "partial" and (known is None or len(row.missing) >= len(known.missing)):
            widest[row.model] = row
    return [f"{model}, worst case and average: partial, {partial_note(row)}" for model, row in widest.items()]


def partial_note(row: TableRow) -> str:
    """ "over 1 of 3 attacks; not run: pgd20, apgd-t" of a partial worst case or average, else empty."""
    if not row.missing:
        return ""
    done = len([part for part in row.combined if part != CLEAN])
    left = len(row.missing) - NAMED
    named = ", ".join(row.missing[:NAMED]) + (f" and {left} more" if left > 0 else "")
    return f"over {done} of {done + len(row.missing)} attacks; not run: {named}"


def has_problem(row: TableRow) -> bool:
    """Whether `problems` mentions a row."""
    return _is_problem(row) or bool(row.suspicions)


def _is_problem(row: TableRow) -> bool:
    return row.status != "ok" or bool(row.left_out or row.near_ties or row.differing)


def _reason(row: TableRow) -> str:
    facts = "; ".join(row.facts)
    if row.status == "ok":
        return facts
    return f"{row.status} ({facts})" if facts else row.status


def _suspicions(rows: Sequence[TableRow]) -> list[str]:
    """The suspicions of rows, one line per model and text."""
    attacks: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for text in row.suspicions:
            attacks.setdefault((row.model, text), []).append(row.attack)
    return [f"{model}, {', '.join(labels)}: {text}" for (model, text), labels in attacks.items()]
