"""What the pages say about flows: NLL tables with curves, and a section per flow."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from robbench.metrics.verdicts import floats
from robbench.report.curves import curve_figure
from robbench.report.gallery import Strip, strips
from robbench.report.plots import CurveFigure
from robbench.results.likelihood import (
    Nll,
    NllTable,
    budget_of,
    mean_text,
    median_text,
    nll_tables,
    summarize,
)
from robbench.results.perturbation import Distances, Footnotes, measure_sizes, size_texts
from robbench.results.rows import ModelResults, cell_status
from robbench.specs import ResolvedAttack
from robbench.store.records import CellResult, Run

NO_SHOTS = "No images: the run stored none of this flow, or not the same samples for every attack."


@dataclass(frozen=True)
class Number:
    """A table cell: what to show, what to sort by (empty when there is nothing) and why it is what it is."""

    text: str
    order: str = ""
    note: str = ""
    more: str = ""


@dataclass(frozen=True)
class NllPart:
    """A table of NLL by budget and flow, and its curves."""

    table: NllTable
    cells: tuple[tuple[Number, ...], ...]
    figure: CurveFigure | None


@dataclass(frozen=True)
class FlowLine:
    """One attack on one flow. steps: None where nothing was searched. numbers: by column key."""

    attack: ResolvedAttack
    steps: int | None
    numbers: Mapping[str, Number]


@dataclass(frozen=True)
class FlowSection:
    """What flow.html.j2 shows of one flow.

    Attributes:
        name: of the flow.
        defense: its training method.
        lines: its attacks, one line per cell.
        strips: images with their bits/dim.
        scores: names of its Fréchet distances.
        footnotes: what they are measured against.
    """

    name: str
    defense: str
    lines: tuple[FlowLine, ...]
    strips: tuple[Strip, ...]
    scores: tuple[str, ...]
    footnotes: tuple[str, ...]


def nll_parts(run: Run) -> list[NllPart]:
    """One part per attack on flows, in plan order."""
    return [
        NllPart(
            table,
            tuple(tuple(_nll_number(cell) for cell in line.cells) for line in table.lines),
            curve_figure(table, number),
        )
        for number, table in enumerate(nll_tables(run), 1)
    ]


def flow_section(run: Run, model: ModelResults, scored: Distances) -> FlowSection:
    """The section of one flow."""
    notes = Footnotes()
    lines = []
    for result in model.cells:
        texts = notes.texts(scored.of_cell(result.cell.hash))
        scores = dict(zip(scored.columns, map(score_number, texts), strict=True))
        lines.append(FlowLine(result.cell.attack, budget_of(result)[1], {**_numbers(run, result), **scores}))
    return FlowSection(
        name=model.name,
        defense=model.first.cell.defense,
        lines=tuple(lines),
        strips=tuple(strips(run, model.cells)),
        scores=scored.columns,
        footnotes=(*scored.floor, *notes.lines),
    )


def flow_lines(run: Run, results: Sequence[CellResult]) -> list[FlowLine]:
    """The cells of flows, a line each, without Fréchet distances."""
    return [FlowLine(r.cell.attack, budget_of(r)[1], _numbers(run, r)) for r in results]


def score_number(text: str) -> Number:
    """A Fréchet distance as "72.12 [1]" or "not run [2]"."""
    return Number(text, text.split()[0] if text[0].isdigit() else "")


def _nll_number(cell: Nll | None) -> Number:
    median = f"median {median_text(cell)}" if median_text(cell) else ""
    order = "" if cell is None or cell.mean is None else repr(cell.mean)
    return Number(mean_text(cell), order, "" if cell is None else cell.note, median)


def _numbers(run: Run, result: CellResult) -> dict[str, Number]:
    status, reason = cell_status(run, result)
    if status != "ok":
        empty = {key: Number("-") for key in ("after", "l2", "linf", "forwards", "backwards", "seconds")}
        return {**empty, "before": Number(status, "", reason)}
    numbers = {key: _nll_number(summarize(floats(result.rows[f"nll_{key}"]))) for key in ("before", "after")}
    size = measure_sizes(run, result)[0].size
    for key, text, value in zip(
        ("l2", "linf"), size_texts(size), (size.l2_mean, size.linf_mean), strict=True
    ):
        numbers[key] = Number(text, repr(value))
    for key in ("forwards", "backwards"):
        mean = float(result.rows[key].mean())
        numbers[key] = Number(f"{mean:.1f}", repr(mean))
    seconds = result.cell.seconds
    return {**numbers, "seconds": Number(f"{seconds:.1f}", repr(seconds))}
