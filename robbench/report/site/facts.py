"""What a reader looks for beside the numbers of a model: paper, architecture, parameters, extra data, source."""

from collections.abc import Iterator, Sequence

from robbench.cards import ModelCard, Paper
from robbench.report.site.tables import ABOUT, Cell, Column

COLUMNS = (
    Column("architecture", "architecture", ABOUT, number=False, first="asc"),
    Column("parameters", "parameters", ABOUT, first="asc"),
    Column("paper", "paper", ABOUT, number=False, first="asc"),
    Column("venue", "venue", ABOUT, number=False, first="asc"),
    Column("year", "year", ABOUT),
    Column("extra data", "extra data", ABOUT, number=False, first="asc"),
    Column("source", "source", ABOUT, number=False, first="asc", shown=False),
)
NONE = Cell("text", "")


def card_facts(card: ModelCard | None) -> dict[str, Cell]:
    """A cell for each of `COLUMNS`, empty where the card does not say."""
    if card is None:
        return {column.key: NONE for column in COLUMNS}
    paper = card.paper or Paper()
    address = card.source.split(",")[0] if card.source.startswith("https://") else ""
    return {
        "architecture": _text(card.architecture.name),
        "parameters": Cell("count", _short(card.parameters), float(card.parameters))
        if card.parameters
        else NONE,
        "paper": Cell("text", paper.title, paper.title or None, url=paper.url) if paper.title else NONE,
        "venue": _text(paper.venue),
        "year": Cell("count", str(paper.year), float(paper.year)) if paper.year else NONE,
        "extra data": _text(card.extra_data),
        "source": Cell("text", card.source, card.source or None, url=address),
    }


def find_columns(found: Sequence[dict[str, Cell]]) -> Iterator[Column]:
    """Those of `COLUMNS` that any model has something in."""
    for column in COLUMNS:
        if any(cells[column.key].text for cells in found):
            yield column


def _text(text: str) -> Cell:
    return Cell("text", text, text) if text else NONE


def _short(parameters: int | None) -> str:
    """ "11.2 M", "83.4 k"."""
    if parameters is None:
        return ""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if parameters >= size:
            return f"{parameters / size:.3g} {unit}"
    return str(parameters)
