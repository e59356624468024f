"""Leaderboards as columns and cells: of all attacks of a group, and of each threat model and budget."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from robbench.metrics.accuracy import CORRUPTION_ACCURACY
from robbench.metrics.frechet import FRECHET_PART
from robbench.metrics.likelihood import NLL_PART
from robbench.report.attack_lines import budget_text
from robbench.report.site.groups import Group
from robbench.report.site.page import slugs
from robbench.report.site.ranks import Range, ranges
from robbench.results import corruptions, wording
from robbench.results.likelihood import Nll, NllTable, caption, mean_text, nll_tables
from robbench.results.perturbation import distances
from robbench.results.rows import CLEAN, ModelResults, TableRow, adversaries
from robbench.results.tables import Wide, accuracy_rows, robust_column, searched_attacks, wide
from robbench.specs import ResolvedAttack
from robbench.store.records import CellResult, Run

Kind = Literal["name", "text", "rank", "score", "partial", "number", "failed", "absent"]
WORST, AVERAGE, RANK = "worst case", "average", "rank"
MANY = (
    12  # single attacks beside worst cases that a reader must ask for, so that a first look fits on a screen
)
SUMMARY, BY_THREAT = "Summary", "Worst case by threat model"


# ------------------------------------------------------------------------------------------------- cells, columns
@dataclass(frozen=True)
class Cell:
    """What a cell shows and sorts by. order: None where there is no number: always last. note: what a reader must know;
    marked: whether it is about this number in particular. file: path of the page that a name links to.

    kind "partial": a worst case or average that leaves out attacks of its board; it sorts below every complete one.
    """

    kind: Kind
    text: str
    order: float | str | None = None
    lower: float | None = None
    upper: float | None = None
    note: str = ""
    marked: bool = False
    file: str = ""

    @property
    def place(self) -> float | str | None:
        """What a page sorts it by, None for last."""
        return None if self.kind == "partial" else self.order


@dataclass(frozen=True)
class Column:
    """key: its name in a permalink. part: its part of the column chooser. shown: before a reader chooses. attack: of a
    column of numbers other than accuracies."""

    key: str
    label: str
    part: str = SUMMARY
    number: bool = True
    first: Literal["asc", "desc"] = "desc"
    shown: bool = True
    fixed: bool = False
    facet: bool = False
    attack: str = ""


@dataclass(frozen=True)
class Table:
    """Lines of cells, one a column. key: of its names in the permalink. sort: order of the lines, "worst case.desc"."""

    key: str
    title: str
    about: str
    caption: str
    explanation: str
    columns: tuple[Column, ...]
    lines: tuple[tuple[Cell, ...], ...]
    sort: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Board:
    """A page of tables. title: "linf, ε = 0.2"; results: the cells that it is about."""

    path: str
    title: str
    tables: tuple[Table, ...]
    results: tuple[CellResult, ...]
    corruption_tables: tuple[corruptions.CorruptionTable, ...] = ()

    @property
    def attacks(self) -> list[ResolvedAttack]:
        """Its attacks, each once, in plan order."""
        return list({r.cell.attack.label: r.cell.attack for r in self.results}.values())


NAME = Column("model", "model", number=False, first="asc", fixed=True)
DEFENSE = Column("defense", "defense", number=False, first="asc", facet=True)


# ------------------------------------------------------------------------------------------------------- boards
def boards(group: Group) -> list[Board]:
    """The leaderboard of all attacks, then one a threat model and budget where there are several."""
    return group.once(_boards)


def _boards(group: Group) -> list[Board]:
    results = tuple(group.run.cells)
    mine = (_accuracies(group, group.rows, results, ""), *_likelihoods(group))
    tables = tuple(table for table in mine if table is not None)
    first = Board(group.board_path(), "All attacks", tables, results, _corruption_tables(group.run, results))
    paths, threats = board_paths(group), _by_threat(group)
    if len(threats) < 2:
        return [first]
    return [first, *(_threat_board(group, paths[title], title, tuple(threats[title])) for title in threats)]


def board_paths(group: Group) -> dict[str, str]:
    """Path of the leaderboard of each threat model and budget (`threat_title`), in plan order; where there is only one,
    it is the board of all attacks."""
    titles = list(_by_threat(group))
    if len(titles) < 2:
        return dict.fromkeys(titles, group.board_path())
    names = slugs(title.replace("ε = ", "").replace("η = ", "eta") for title in titles)
    return {title: group.board_path(name) for title, name in zip(titles, names.values(), strict=True)}


def _by_threat(group: Group) -> dict[str, list[CellResult]]:
    """The cells of classifiers."""
    found: dict[str, list[CellResult]] = {}
    for result in group.run.cells:
        if result.cell.attack.target == "classifier":
            found.setdefault(threat_title(result.cell.attack), []).append(result)
    return found


def _threat_board(group: Group, path: str, title: str, results: tuple[CellResult, ...]) -> Board:
    labels = {result.cell.attack.label for result in results}
    attacks = [cell for cell in searched_attacks(_classifiers(group)) if cell.cell.attack.label in labels]
    rows: list[TableRow] = []
    for model in _classifiers(group):
        cells = tuple(r for r in model.cells if r.cell.attack.label in labels)
        rows += accuracy_rows(group.run, ModelResults(model.name, cells), attacks) if cells else []
    rows += [row for row in group.rows if row.attack in labels and not row.kind.accuracy]
    tables = tuple(table for table in [_accuracies(group, rows, results, title)] if table is not None)
    return Board(path, title, tables, results, _corruption_tables(group.run, results))


def threat_title(attack: ResolvedAttack) -> str:
    """ "linf, ε = 0.2"; only the threat model's name where there is no budget."""
    budget = budget_text(attack)
    return attack.threat_model if budget == "none" else f"{attack.threat_model}, {budget}"


def _classifiers(group: Group) -> list[ModelResults]:
    return [model for model in group.models if model.kind == "classifier"]


def _corruption_tables(run: Run, results: Sequence[CellResult]) -> tuple[corruptions.CorruptionTable, ...]:
    corrupted = [r for r in results if r.cell.attack.space == corruptions.SPACE]
    return tuple(corruptions.corruption_tables(replace(run, cells=corrupted))) if corrupted else ()


# --------------------------------------------------------------------------------------------------- accuracies
def _accuracies(
    group: Group, rows: Sequence[TableRow], results: Sequence[CellResult], threat: str
) -> Table | None:
    """The table of models by attacks. threat: title of the threat model; "" for all attacks."""
    classifiers = _classifiers(group)
    if not classifiers:
        return None
    names = {model.name for model in classifiers}
    rows = [row for row in rows if row.model in names]
    searched = [r for r in results if r.cell.attack.space != corruptions.SPACE and r.cell.model in names]
    labels = list(dict.fromkeys(r.cell.attack.label for r in searched))
    strict = list(dict.fromkeys(r.cell.attack.label for r in adversaries(searched)))
    found = ranges(group.run, classifiers, strict)
    if len(found) < 2:
        found = {}  # nothing to be compared with
    matrix = _wide(rows, bool(searched))
    mixed = (
        group.is_sweep and not threat
    )  # over its budgets and steps a worst case or an average says nothing
    if mixed:
        single = {CLEAN, *labels, *map(robust_column, labels)}
        matrix = replace(matrix, columns=tuple(c for c in matrix.columns if c in single))
        found = {}
    columns = _columns(matrix, results, labels, rows)
    if mixed:
        columns = [replace(column, shown=True) if column.key in labels else column for column in columns]
    scored = _scored(rows)
    lines = [
        (
            Cell("name", name, name, file=group.model_path(name)),
            Cell("text", defense, defense),
            *(_cell(column, name, matrix, scored, found, len(strict)) for column in columns[2:]),
        )
        for name, defense in matrix.models
    ]
    keys = {column.key for column in columns}
    main = next(key for key in (WORST, corruptions.MEAN, CLEAN) if key in keys)
    return Table(
        key="",
        title=f"Accuracy under {threat}" if threat else "Accuracy under attack",
        about="",
        caption=f"Accuracy in percent and its 95 % interval; n = {group.run.n} for every cell.",
        explanation=" ".join(
            filter(None, [wording.measures(rows), _explanation(group.run, columns, bool(found))])
        ),
        columns=tuple(columns),
        lines=tuple(_best_first(lines, columns, main, bool(found))),
        sort=f"{main}.desc" if not found else f"{RANK}.asc",
        notes=tuple(wording.problems([row for row in rows if not (mixed and row.missing)])),
    )


def _wide(rows: Sequence[TableRow], has_attacks: bool) -> Wide:
    """Accuracies as a matrix; a board of corruptions alone shows each of them."""
    if has_attacks:
        return wide(rows)
    singles = wide([row for row in rows if row.metric != CORRUPTION_ACCURACY.name])
    means = {(row.model, row.attack): row for row in rows if row.metric == CORRUPTION_ACCURACY.name}
    mean = (corruptions.MEAN,) if means else ()
    return replace(
        singles,
        columns=(CLEAN, *mean, *(c for c in singles.columns if c != CLEAN)),
        cells=singles.cells | means,
    )


def _columns(
    matrix: Wide, results: Sequence[CellResult], labels: Sequence[str], rows: Sequence[TableRow]
) -> list[Column]:
    """Model, defense and summaries first, then worst cases by threat model, attacks, likelihoods, distances."""
    attacks = {r.cell.attack.label: threat_title(r.cell.attack) for r in results}
    attacks |= {robust_column(label): title for label, title in attacks.items()}
    summary = [
        c for c in (CLEAN, WORST, AVERAGE, corruptions.MEAN) if c in matrix.columns and c not in attacks
    ]
    partial = [c for c in matrix.columns if c not in summary and c not in attacks]
    single = [c for c in matrix.columns if c in attacks]
    few = len(single) <= MANY
    ranked = [Column(RANK, "rank", first="asc")] if WORST in summary and len(matrix.models) > 1 else []
    scores = _score_columns(rows)
    with_scores = len(single) + len(scores) <= MANY
    return [
        NAME,
        DEFENSE,
        *ranked,
        *(Column(c, c) for c in summary),
        *(Column(c, c, BY_THREAT) for c in partial),
        *(Column(c, c, attacks[c], shown=few) for c in single),
        *(replace(column, shown=with_scores) for column in scores),
    ]


def _score_key(row: TableRow) -> str:
    return f"{row.kind.column_of(row.metric)} {row.attack}"


def _scored(rows: Iterable[TableRow]) -> dict[tuple[str, str], TableRow]:
    """The numbers that metrics show in columns of their own (likelihoods, Fréchet distances), by (model, column)."""
    return {(row.model, _score_key(row)): row for row in rows if row.model and row.kind.part}


def _score_columns(rows: Iterable[TableRow]) -> list[Column]:
    found: dict[str, tuple[int, Column]] = {}
    for row in rows:
        if row.model and (metric := row.kind).part:
            key, first = _score_key(row), "desc" if metric.better == "higher" else "asc"
            column = Column(key, key, metric.part, first=first, attack=row.attack)  # type: ignore[arg-type]
            found.setdefault(key, (metric.place, column))
    return [column for _, column in sorted(found.values(), key=lambda item: item[0])]


def _cell(
    column: Column,
    model: str,
    matrix: Wide,
    scored: dict[tuple[str, str], TableRow],
    found: dict[str, Range],
    attacks: int,
) -> Cell:
    """attacks: how many of the board a worst case combines."""
    if column.key == RANK:
        return _rank_cell(found.get(model), attacks)
    if column.attack:
        return _number_cell(scored.get((model, column.key)), matrix.cells.get((model, column.attack)))
    return _score_cell(matrix.cells.get((model, column.key)))


def _rank_cell(found: Range | None, attacks: int) -> Cell:
    if found is None:
        return Cell(
            "absent", "none", note=f"no rank: not all {attacks} attacks of this board are complete on it"
        )
    best, worst = found
    return Cell("rank", f"{best}" if best == worst else f"{best}-{worst}", best + worst * 1e-7)


def _score_cell(row: TableRow | None) -> Cell:
    if row is None:
        return Cell("absent", "not run")
    if not row.measured or row.value is None:
        return _status_cell(row)
    note, marked = row.note, wording.has_problem(row)
    if row.combined:  # a list of all attacks in every cell would only fill the page
        note, marked = wording.partial_note(row), row.status == "partial"
    kind: Kind = "partial" if row.status == "partial" else "score"
    return Cell(kind, f"{row.value:.1f}", row.value, row.lower, row.upper, note, marked)


def _status_cell(row: TableRow) -> Cell:
    return Cell("failed" if row.status == "failed" else "absent", row.status, note=row.note)


def _number_cell(row: TableRow | None, accuracy: TableRow | None) -> Cell:
    """A likelihood or distance. Without one the accuracy of the same attack says why."""
    if row is None:
        if accuracy is not None and accuracy.status != "ok":
            return _status_cell(accuracy)
        if accuracy is None:
            return Cell("absent", "not run")
        return Cell("absent", "none", note="the attack broke no sample, or its images were not scored")
    if row.status != "ok":
        return _status_cell(row)
    finite = row.value is not None and math.isfinite(row.value)
    return Cell("number", wording.number_text(row), row.value if finite else None, note=row.note)


def _best_first(
    lines: Sequence[tuple[Cell, ...]], columns: Sequence[Column], main: str, ranked: bool
) -> Iterator[tuple[Cell, ...]]:
    """By rank; models that were attacked by all first; then by the number of the board, then by the average."""
    keys = [column.key for column in columns]
    place, rank = keys.index(main), keys.index(RANK) if ranked else 0
    average = keys.index(AVERAGE) if AVERAGE in keys else place

    def position(line: tuple[Cell, ...]) -> tuple[float, ...]:
        first = _signed(line[rank], 1) if ranked else 0.0
        return (
            first,
            line[place].kind == "partial",
            _signed(line[place], -1),
            _signed(line[average], -1),
        )

    yield from sorted(lines, key=position)


def _signed(cell: Cell, sign: int) -> float:
    return math.inf if not isinstance(cell.order, float) else sign * cell.order


def _explanation(run: Run, columns: Sequence[Column], ranked: bool) -> str:
    parts = {column.part for column in columns}
    texts = [wording.INTERVALS, "A star: see the notes on single numbers."]
    if NLL_PART in parts:
        texts.append(
            "NLL: mean bits/dim by the flow of each model's cells, from one draw of the dequantisation noise an image, "
            "of the images with which the attack succeeded."
        )
    if FRECHET_PART in parts:
        texts += ["Fréchet distances: all images of the cell to the training images.", *distances(run).floor]
    if not ranked and any(column.key == RANK for column in columns):
        texts.append("No model has a rank: fewer than two are complete under every attack of this board.")
    return " ".join(texts)


# --------------------------------------------------------------------------------------------------- likelihoods
def _likelihoods(group: Group) -> list[Table]:
    """Boards of flows: bits/dim by flow and budget, one table an attack."""
    return [_likelihood(group, table, number) for number, table in enumerate(nll_tables(group.run), 1)]


def _likelihood(group: Group, table: NllTable, number: int) -> Table:
    budgets = [table.budget(line) for line in table.lines]
    columns = [Column(text, text, "Budgets", first="asc") for text in budgets]
    lines = [
        (
            Cell("name", name, name, file=group.model_path(name)),
            Cell("text", defense, defense),
            *(_nll_cell(line.cells[place]) for line in table.lines),
        )
        for place, (name, defense) in enumerate(table.models)
    ]
    return Table(
        key=f"nll{number}",
        title=f"Likelihood under {table.attack}",
        about=table.about,
        caption=f"NLL in bits/dim; n = {group.run.n} for every cell.",
        explanation=caption(group.run),
        columns=(NAME, DEFENSE, *columns),
        lines=tuple(lines),
        notes=tuple(table.footnotes),
    )


def _nll_cell(nll: Nll | None) -> Cell:
    text = mean_text(nll)
    if nll is None or nll.status != "ok":
        return Cell("failed" if text == "failed" else "absent", text, note=nll.note if nll else "")
    return Cell("number", text.removesuffix("*"), nll.mean, note=nll.note, marked=bool(nll.note))
