"""The leaderboards of a group: one a threat model and budget, the first of which its folder opens with; then
likelihoods; then every attack in one table."""

from collections.abc import Sequence
from dataclasses import replace

from robbench.metrics.accuracy import CORRUPTION_ACCURACY
from robbench.report.attack_lines import budget_words
from robbench.report.site.board_likelihoods import flow_tables, score_table
from robbench.report.site.facts import card_facts, find_columns
from robbench.report.site.groups import Group
from robbench.report.site.page import slugs
from robbench.report.site.ranks import Range, ranges
from robbench.report.site.scatter import Point, Scatter, scatter_of
from robbench.report.site.tables import (
    ABOUT,
    AVERAGE,
    BY_THREAT,
    DEFENSE,
    NAME,
    RANK,
    WORST,
    Board,
    Cell,
    Column,
    Table,
    best_first,
    score_cell,
)
from robbench.results import corruptions, wording
from robbench.results.parity import ALGORITHM
from robbench.results.rows import CLEAN, OBLIVIOUS, ModelResults, TableRow, adversaries
from robbench.results.tables import Wide, accuracy_rows, robust_column, searched_attacks, wide
from robbench.specs import ResolvedAttack
from robbench.store.records import CellResult, Run

EVERY, EVERY_BUDGET, LIKELIHOOD = "Every attack", "Every budget", "Likelihood"
ROOM = 1_280  # pixels of the tables of a page at 1400
FEW = 12  # attacks of a threat model that a first look shows


def boards(group: Group) -> list[Board]:
    """All leaderboards of a group, the one that its folder opens with first."""
    return group.once(_boards)


def _boards(group: Group) -> list[Board]:
    threats, paths = by_threat(group), board_paths(group)
    found = [_threat_board(group, paths[title], title, tuple(cells)) for title, cells in threats.items()]
    likelihoods = tuple(filter(None, [score_table(group, group.rows), *flow_tables(group)]))
    if likelihoods:
        path = group.board_path("likelihood" if found else "")
        found.append(Board(path, LIKELIHOOD, likelihoods, tuple(group.run.cells)))
    if len(threats) > 1:
        found.append(_every_board(group))
    return found


def board_paths(group: Group) -> dict[str, str]:
    """Path of the leaderboard of each threat model and budget (`threat_title`)."""
    first, *others = list(by_threat(group)) or [""]
    short = {title: title.replace("ε = ", "").replace("η = ", "eta") for title in others}
    names = slugs(short.values())
    return {first: group.board_path()} | {title: group.board_path(names[short[title]]) for title in others}


def by_threat(group: Group) -> dict[str, list[CellResult]]:
    """The cells of classifiers by the title of their threat model and budget, the leading one first: Linf before
    others, with AutoAttack before without, then by the number of cells; the others in plan order."""
    found: dict[str, list[CellResult]] = {}
    decided = [result for result in group.run.cells if result.cell.decides]
    balls = {
        _ball(one.cell.attack): threat_title(one.cell.attack) for one in decided if not one.cell.is_adaptive
    }
    for result in decided:
        attack = result.cell.attack
        # What knows a detector stands beside what ignores it.
        joined = balls.get(_ball(attack)) if result.cell.is_adaptive else None
        found.setdefault(joined or threat_title(attack), []).append(result)
    first = max(found, key=lambda title: _worth(found[title]), default=None)
    return found if first is None else {first: found[first]} | found


def _ball(attack: ResolvedAttack) -> tuple[str, str, float | None, float | None]:
    """The set of images of an attack, by whatever name its threat model has."""
    return attack.space, attack.norm, attack.epsilon, attack.eta


def _worth(results: Sequence[CellResult]) -> tuple[bool, bool, bool, int]:
    attack = results[0].cell.attack
    return (
        bool(adversaries(results)),
        attack.threat_model == "linf",
        any(r.cell.attack.algorithm == ALGORITHM for r in results),
        len(results),
    )


def threat_title(attack: ResolvedAttack) -> str:
    """ "linf, ε = 0.2"; only the threat model's name where its attacks have no budget or one in units of their own."""
    if attack.threat is None:
        return f"{attack.threat_model}, other budgets"
    name, epsilon, eta = attack.threat
    return ", ".join(filter(None, [name, budget_words(epsilon, eta)]))


def _threat_board(group: Group, path: str, title: str, results: tuple[CellResult, ...]) -> Board:
    labels = {result.cell.attack.label for result in results}
    attacks = [cell for cell in searched_attacks(_classifiers(group)) if cell.cell.attack.label in labels]
    rows: list[TableRow] = []
    for model in _classifiers(group):
        cells = tuple(r for r in model.cells if r.cell.attack.label in labels)
        rows += accuracy_rows(group.run, ModelResults(model.name, cells), attacks) if cells else []
    table = _Accuracies(group, rows, results, title).table
    return Board(path, title, (table,), results, _corruption_tables(group.run, results))


def _every_board(group: Group) -> Board:
    results = tuple(r for r in group.run.cells if r.cell.decides)
    names = {model.name for model in _classifiers(group)}
    rows = [row for row in group.rows if row.model in names and row.kind.accuracy]
    table = _Accuracies(group, rows, results, "").table
    title = EVERY_BUDGET if group.is_sweep else EVERY
    corrupted = _corruption_tables(group.run, results)
    return Board(group.board_path("all"), title, (table,), results, corrupted, is_union=True)


def _classifiers(group: Group) -> list[ModelResults]:
    return [model for model in group.models if model.kind == "classifier"]


def _corruption_tables(run: Run, results: Sequence[CellResult]) -> tuple[corruptions.CorruptionTable, ...]:
    corrupted = [r for r in results if r.cell.attack.space == corruptions.SPACE]
    return tuple(corruptions.corruption_tables(replace(run, cells=corrupted))) if corrupted else ()


class _Accuracies:
    """The table of models by attacks of some cells.

    threat: title of their threat model and budget; "" for all of a group, over which there is neither a rank nor, in a
    sweep, a worst case or an average.
    """

    def __init__(
        self, group: Group, rows: Sequence[TableRow], results: Sequence[CellResult], threat: str
    ) -> None:
        self.group, self.rows, self.results, self.threat = group, rows, results, threat
        searched = [r for r in results if r.cell.attack.space != corruptions.SPACE]
        self.labels = list(dict.fromkeys(r.cell.attack.label for r in searched))
        self.strict = list(dict.fromkeys(r.cell.attack.label for r in adversaries(searched)))
        self.mixed = group.is_sweep and not threat
        self.oblivious = {row.model for row in rows if row.oblivious}
        self.matrix = self._matrix()
        self.ranks = self._ranks()

    def _matrix(self) -> Wide:
        matrix = _wide(self.rows, bool(self.labels))
        if not self.mixed:
            return matrix
        single = {CLEAN, *self.labels, *map(robust_column, self.labels)}
        return replace(matrix, columns=tuple(c for c in matrix.columns if c in single))

    def _ranks(self) -> dict[str, Range]:
        """Of models that are compared with others."""
        found = ranges(self.group.run, _classifiers(self.group), self.strict) if self.threat else {}
        return found if len(found) > 1 else {}

    @property
    def table(self) -> Table:
        """The table."""
        known = {name: card_facts(self.group.card(name)) for name, _ in self.matrix.models}
        columns = self._columns(list(find_columns(list(known.values()))))
        lines = [
            tuple(self._cell(column, name, defense, known[name]) for column in columns)
            for name, defense in self.matrix.models
        ]
        main = self._main(columns)
        lines = list(best_first(lines, columns, main))
        ranked = any(column.key == RANK for column in columns) and bool(self.ranks)
        found = Table(
            key="",
            title=f"Accuracy under {self.threat}" if self.threat else "Accuracy under attack",
            about="",
            caption=f"Accuracy in percent and its 95 % interval; n = {self.group.run.n} for every cell.",
            explanation=self._explanation(columns),
            columns=tuple(columns),
            lines=tuple(lines),
            sort=f"{RANK}.asc" if ranked else f"{main}.desc",
            notes=tuple(wording.problems([row for row in self.rows if not (self.mixed and row.missing)])),
        )
        return replace(found, scatter=_scatter(found) if self.threat else None)

    def _main(self, columns: Sequence[Column]) -> str:
        keys = {column.key for column in columns}
        order = (WORST if self.threat else AVERAGE, *corruptions.MEANS, CLEAN)
        return next(key for key in order if key in keys)

    def _columns(self, facts: Sequence[Column]) -> list[Column]:
        """Model, rank, clean and worst case first, then what is known of the model, then attacks."""
        attacks = {r.cell.attack.label: threat_title(r.cell.attack) for r in self.results}
        attacks |= {robust_column(label): title for label, title in attacks.items()}
        given = self.matrix.columns
        summary = [c for c in (CLEAN, WORST, *corruptions.MEANS, AVERAGE) if c in given and c not in attacks]
        single = [c for c in given if c in attacks]
        single = [c for c in single if self._is_ensemble(c)] + [c for c in single if not self._is_ensemble(c)]
        ranked = WORST in summary and len(self.matrix.models) > 1 and bool(self.threat)
        main = WORST if WORST in summary else CLEAN
        shown = self.mixed or len(single) <= FEW
        columns = [
            NAME,
            *([Column(RANK, "rank", first="asc")] if ranked else []),
            *(Column(c, c, narrow=c == main, shown=bool(self.threat) or c != WORST) for c in summary),
            *(Column(c, c, BY_THREAT) for c in given if c not in summary and c not in attacks),
            DEFENSE,
            *facts,
            *(Column(c, c, attacks[c], shown=shown) for c in single),
        ]
        return columns if self.mixed else _fitting(columns, [name for name, _ in self.matrix.models])

    def _is_ensemble(self, label: str) -> bool:
        return any(
            r.cell.attack.label == label and r.cell.attack.algorithm == ALGORITHM for r in self.results
        )

    def _cell(self, column: Column, model: str, defense: str, facts: dict[str, Cell]) -> Cell:
        if column.key == NAME.key:
            return Cell("name", model, model, file=self.group.model_path(model))
        if column.key == DEFENSE.key:
            return Cell("text", defense, defense)
        if column.key == RANK:
            return _rank_cell(self.ranks.get(model), len(self.strict), model in self.oblivious)
        if column.part == ABOUT:
            return facts[column.key]
        return score_cell(self.matrix.cells.get((model, column.key)))

    def _explanation(self, columns: Sequence[Column]) -> str:
        texts = [wording.measures(self.rows), wording.INTERVALS, "A star: see the notes on single numbers."]
        if not self.ranks and any(column.key == RANK for column in columns):
            texts.append("No model has a rank: fewer than two are complete under every attack of this board.")
        return " ".join(filter(None, texts))


def _fitting(columns: Sequence[Column], names: Sequence[str]) -> list[Column]:
    """The columns, of which those are shown at first that find room beside each other."""
    room = ROOM - min(256, max(128, 9 * max(map(len, names), default=0)))
    found = []
    for column in columns:
        width = 76 if column.key in (RANK, "year") else 100 if column.number else 108
        shown = column.fixed or (column.shown and room >= width)
        room -= width if shown and not column.fixed else 0
        found.append(replace(column, shown=shown))
    return found


def _wide(rows: Sequence[TableRow], has_attacks: bool) -> Wide:
    """Accuracies as a matrix; a board of corruptions alone shows each of them."""
    if has_attacks:
        return wide(rows)
    singles = wide([row for row in rows if row.metric != CORRUPTION_ACCURACY.name])
    means = {(row.model, row.attack): row for row in rows if row.metric == CORRUPTION_ACCURACY.name}
    columns = dict.fromkeys(attack for _, attack in means)
    return replace(
        singles,
        columns=(CLEAN, *columns, *(c for c in singles.columns if c != CLEAN)),
        cells=singles.cells | means,
    )


def _rank_cell(found: Range | None, attacks: int, oblivious: bool) -> Cell:
    """attacks: how many of the board a worst case combines. oblivious: see `TableRow`."""
    if found is None and oblivious:
        return Cell("absent", "none", note=f"no rank: {OBLIVIOUS}")
    if found is None:
        return Cell(
            "absent", "none", note=f"no rank: not all {attacks} attacks of this board are complete on it"
        )
    best, worst = found
    return Cell("rank", f"{best}" if best == worst else f"{best}-{worst}", best + worst * 1e-7)


def _scatter(table: Table) -> Scatter | None:
    """Clean against worst case, or against the mean over corruptions, of the models that have both."""
    across = table.column(CLEAN)
    key = next((key for key in (WORST, *corruptions.MEANS) if table.column(key) is not None), None)
    up = table.column(key) if key else None
    if across is None or up is None or key is None:
        return None
    pairs = [(line[0], _estimate(line[across]), _estimate(line[up])) for line in table.lines]
    points = [Point(name.text, name.file, clean, robust) for name, clean, robust in pairs if clean and robust]
    return scatter_of(key, points)


def _estimate(cell: Cell) -> tuple[float, float, float] | None:
    """A complete number with its interval."""
    if cell.kind != "score" or not isinstance(cell.order, float) or cell.lower is None or cell.upper is None:
        return None
    return (cell.order, cell.lower, cell.upper)
