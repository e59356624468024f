"""Tables of likelihoods: bits/dim of flows by budget, and of the adversarial images of classifiers by attack."""

from collections.abc import Iterable, Sequence

from robbench.metrics.frechet import FRECHET_PART
from robbench.metrics.likelihood import NLL_PART
from robbench.report.site.groups import Group
from robbench.report.site.tables import DEFENSE, NAME, Cell, Column, Table, number_cell
from robbench.results.likelihood import Nll, NllTable, caption, mean_text, nll_tables
from robbench.results.perturbation import distances
from robbench.results.rows import TableRow

SHOWN = 9  # columns that a first look shows
NLL_WORDS = (
    "NLL: mean bits/dim by the flow of each model's cells, from one draw of the dequantisation noise an image, of the "
    "images with which the attack succeeded."
)


def score_table(group: Group, rows: Sequence[TableRow]) -> Table | None:
    """The numbers other than accuracies that metrics show of the adversarial images of classifiers, by attack."""
    names = {model.name: model for model in group.models if model.kind == "classifier"}
    scored = {(row.model, _key(row)): row for row in rows if row.model in names and row.kind.part}
    if not scored:
        return None
    columns = _columns(scored.values())
    accuracies = {(row.model, row.attack): row for row in rows if row.metric == "accuracy"}
    lines = [
        (
            Cell("name", name, name, file=group.model_path(name)),
            Cell("text", model.first.cell.defense, model.first.cell.defense),
            *(number_cell(scored.get((name, c.key)), accuracies.get((name, c.attack))) for c in columns),
        )
        for name, model in names.items()
    ]
    parts = {column.part for column in columns}
    words = [NLL_WORDS] if NLL_PART in parts else []
    if FRECHET_PART in parts:
        words += [
            "Fréchet distances: all images of the cell to the training images.",
            *distances(group.run).floor,
        ]
    return Table(
        key="images",
        title="Adversarial images of classifiers",
        about="",
        caption=f"n = {group.run.n} for every cell.",
        explanation=" ".join(words),
        columns=(NAME, DEFENSE, *columns),
        lines=tuple(lines),
    )


def _key(row: TableRow) -> str:
    return f"{row.kind.column_of(row.metric)} {row.attack}"


def _columns(rows: Iterable[TableRow]) -> list[Column]:
    found: dict[str, tuple[int, TableRow]] = {}
    for row in rows:
        found.setdefault(_key(row), (row.kind.place, row))
    ordered = sorted(found.items(), key=lambda item: item[1][0])
    return [_column(key, row, number) for number, (key, (_, row)) in enumerate(ordered)]


def _column(key: str, row: TableRow, number: int) -> Column:
    return Column(
        key,
        key,
        row.kind.part,
        first="desc" if row.kind.better == "higher" else "asc",
        shown=number < SHOWN,
        narrow=number == 0,
        attack=row.attack,
    )


def flow_tables(group: Group) -> list[Table]:
    """Bits/dim by flow and budget, one table an attack."""
    return [_flow_table(group, table, number) for number, table in enumerate(nll_tables(group.run), 1)]


def _flow_table(group: Group, table: NllTable, number: int) -> Table:
    budgets = [table.budget(line) for line in table.lines]
    columns = [Column(text, text, "Budgets", first="asc", narrow=k == 0) for k, text in enumerate(budgets)]
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
