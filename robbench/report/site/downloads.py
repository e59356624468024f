"""Tables as files: CSV, Parquet, JSON, LaTeX and Markdown of the numbers that the pages show.

CSV, Parquet and JSON keep every digit. LaTeX and Markdown are for papers and read-mes: in them the numbers of a
leaderboard are rounded as on its page. The same table gives the same bytes.
"""

import io
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from robbench.core.markdown import markdown_table
from robbench.core.resources import utf8
from robbench.core.spreadsheet import csv_text
from robbench.report.site import tables as layout
from robbench.report.site.boards import boards
from robbench.report.site.frame import body
from robbench.report.site.groups import Group, Site
from robbench.report.site.model_detection import ROC_COLUMNS, roc_lines
from robbench.report.site.model_figures import FIGURED, model_figures
from robbench.report.site.page import Download, Part, slugs
from robbench.report.writers import likelihood_lines
from robbench.results.likelihood import nll_tables
from robbench.results.rows import COLUMNS, TableRow

Value = str | int | float | bool | None
Lines = tuple[tuple[Value, ...], ...]
EXACT = ("csv", "parquet", "json")
ALL = (*EXACT, "tex", "md")
CALLED = {"csv": "CSV", "parquet": "Parquet", "json": "JSON", "tex": "LaTeX", "md": "Markdown"}
MEDIA = {
    "csv": "text/csv",
    "parquet": "application/vnd.apache.parquet",
    "json": "application/json",
    "tex": "application/x-tex",
    "md": "text/markdown",
}
READABLE, WHOLE = 2_000, 20_000  # lines of a table that is still written as LaTeX and Markdown; as JSON
FULL_MODELS, CSV_MODELS = 25, 1_000  # up to so many models each has all formats, or a CSV, of its own
_LONGEST = {"tex": READABLE, "md": READABLE, "json": WHOLE}
# Not in tables to be read: the same in every line, or too long.
CONSTANT = ("dataset", "n", "seed", "model_sha256")


@dataclass(frozen=True)
class Table:
    """A table of values.

    Attributes:
        path: of its files, without their ending.
        title: as pages call it.
        columns: their names.
        lines: values, one per column.
        read: header and texts of its LaTeX and Markdown, default the values themselves.
        caption: of the LaTeX.
        formats: the files it has.
    """

    path: str
    title: str
    columns: tuple[str, ...]
    lines: Lines
    read: tuple[tuple[str, ...], tuple[tuple[str, ...], ...]] | None = None
    caption: str = ""
    formats: tuple[str, ...] = ALL


def parts(site: Site) -> Iterator[Part]:
    """The files of all tables of all groups."""
    for group in site.groups:
        for table in group_tables(group):
            yield from files(table)


def files(table: Table) -> Iterator[Download]:
    """The files of a table."""
    for ending in table.formats:
        yield Download(f"{table.path}.{ending}", _WRITERS[ending](table), MEDIA[ending])


def section(tables: Sequence[Table]) -> Markup:
    """What a page says of the files of its tables; empty without any."""
    entries = [
        (table.title, [(CALLED[ending], f"{table.path}.{ending}") for ending in table.formats])
        for table in tables
    ]
    return body("downloads.html.j2", entries=entries) if entries else Markup("")


def group_tables(group: Group) -> list[Table]:
    """Every table of a group."""
    return [table for tables in tables_by_page(group).values() for table in tables]


def tables_by_page(group: Group) -> dict[str, list[Table]]:
    """The tables of a group by the path of the page that offers them."""
    return group.once(_all_tables)


def _all_tables(group: Group) -> dict[str, list[Table]]:
    names = _board_names(boards(group))
    found = {board.path: _board_tables(group, board, names[board.path]) for board in boards(group)}
    first = found.setdefault(group.board_path(), [])
    first += _likelihood(group)
    first.append(_tidy(group, "leaderboard", "Every number, one per line", group.rows))
    models = group.models
    if len(models) <= CSV_MODELS:
        rows: dict[str, list[TableRow]] = {}
        for row in group.rows:
            rows.setdefault(row.model, []).append(row)
        formats = ALL if len(models) <= FULL_MODELS else ("csv",)
        for model in models:
            path = group.model_path(model.name)
            stem = path.rpartition("/")[2].removesuffix(".html")
            mine = rows.get(model.name, [])
            found[path] = [_tidy(group, stem, "Every number of this model, one per line", mine, formats)]
            if points := roc_lines(group.run, model):
                place, title = f"{group.slug}/downloads/{stem}-roc", "ROC curves, a point per line"
                found[path].append(Table(place, title, ROC_COLUMNS, points, formats=("csv",)))
            found[path] += _figure_tables(group, model.name, stem)
    return found


def _figure_tables(group: Group, model: str, stem: str) -> list[Table]:
    """The numbers of the figures of a model's page, where it has some."""
    if len(group.models) > FIGURED:
        return []
    path, exact = f"{group.slug}/downloads/{stem}", EXACT
    return [
        Table(f"{path}-{figure.key}", figure.title, figure.columns, figure.lines, formats=exact)
        for figure in model_figures(group, model)
    ]


def _tidy(
    group: Group, name: str, title: str, rows: Sequence[TableRow], formats: tuple[str, ...] = ALL
) -> Table:
    lines = tuple(tuple(row.cell(column) for column in COLUMNS) for row in rows)
    kept = [k for k, column in enumerate(COLUMNS) if column not in CONSTANT]
    read = tuple(COLUMNS[k] for k in kept), tuple(tuple(_text(line[k]) for k in kept) for line in lines)
    return Table(
        path=f"{group.slug}/downloads/{name}",
        title=title,
        columns=COLUMNS,
        lines=lines,
        read=read,
        caption=group.title,
        formats=tuple(f for f in formats if len(lines) <= _LONGEST.get(f, len(lines))),
    )


def _board_names(found: Sequence[layout.Board]) -> dict[str, str]:
    """The file of each leaderboard by its path: "leaderboard-wide" is of all attacks."""
    short = {board.path: board.title.replace("ε = ", "").replace("η = ", "eta") for board in found}
    names = slugs(short.values())
    whole = next((board for board in reversed(found) if board.accuracies), None)
    return {
        path: "leaderboard-wide" if whole and path == whole.path else f"leaderboard-{names[title]}"
        for path, title in short.items()
    }


def _board_tables(group: Group, board: layout.Board, name: str) -> list[Table]:
    """The accuracies of a board, every column of it, shown or not."""
    return [
        Table(
            path=f"{group.slug}/downloads/{name}",
            title=table.title,
            columns=tuple(_wide_columns(table)),
            lines=tuple(_wide_line(table, line) for line in table.lines),
            read=_read(table),
            caption=f"{table.title}; {group.title}",
        )
        for table in board.tables
        if not table.key
    ]


def _wide_columns(table: layout.Table) -> Iterator[str]:
    for column in table.columns:
        yield column.key
        if _is_measured(column):
            yield from (f"{column.key}_{part}" for part in ("lower", "upper", "status"))


def _is_measured(column: layout.Column) -> bool:
    return column.number and column.key != layout.RANK and column.part != layout.ABOUT


def _plain_value(cell: layout.Cell) -> Value:
    """A name, a rank or what a card says."""
    if cell.kind == "count" and isinstance(cell.order, float):
        return int(cell.order)
    return None if cell.kind == "absent" else cell.text or None


def _wide_line(table: layout.Table, line: Sequence[layout.Cell]) -> tuple[Value, ...]:
    values: list[Value] = []
    for column, cell in zip(table.columns, line, strict=True):
        if not _is_measured(column):
            values.append(_plain_value(cell))
            continue
        known = cell.kind in ("score", "partial", "number")
        status = cell.text if not known else "partial" if cell.kind == "partial" else "ok"
        values += [cell.order if known else None, cell.lower, cell.upper, status]
    return tuple(values)


def _read(table: layout.Table) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """The columns that the page shows at first, rounded as there."""
    shown = [k for k, column in enumerate(table.columns) if column.shown]
    header = tuple(table.columns[k].label for k in shown)
    return header, tuple(tuple(_cell_text(line[k]) for k in shown) for line in table.lines)


def _cell_text(cell: layout.Cell) -> str:
    if cell.lower is None or cell.upper is None:
        return cell.text
    mark = "partial: " if cell.kind == "partial" else ""
    return f"{mark}{cell.text} [{cell.lower:.1f}, {cell.upper:.1f}]"


def _likelihood(group: Group) -> list[Table]:
    found = nll_tables(group.run)
    if not found:
        return []
    header, *lines = likelihood_lines(found)
    path = f"{group.slug}/downloads/likelihood"
    title = "NLL of the flows in bits/dim, by attack and budget"
    values = tuple(tuple(line) for line in lines)
    return [Table(path, title, tuple(map(str, header)), values, caption=f"{title}; {group.title}")]  # type: ignore[arg-type]


def _text(value: Value) -> str:
    """A value with every digit; empty for None."""
    return "" if value is None else repr(value) if isinstance(value, float) else str(value)


def _show(table: Table) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    return table.read or (table.columns, tuple(tuple(map(_text, line)) for line in table.lines))


def _csv(table: Table) -> bytes:
    return utf8(csv_text([table.columns, *table.lines]))


def _json(table: Table) -> bytes:
    """A list of objects. Numbers that JSON lacks are the texts "inf", "-inf" and "nan"."""
    records = [dict(zip(table.columns, map(_plain, line), strict=True)) for line in table.lines]
    lines = ",\n".join(json.dumps(record, ensure_ascii=False, allow_nan=False) for record in records)
    return utf8(f"[\n{lines}\n]\n")


def _plain(value: Value) -> Value:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _parquet(table: Table) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = list(zip(*table.lines, strict=True)) or [()] * len(table.columns)
    arrays = [pa.array(values, _type(values)) for values in columns]
    stream = io.BytesIO()
    pq.write_table(pa.table(arrays, names=list(table.columns)), stream, compression="zstd")
    return stream.getvalue()


def _type(values: Sequence[Value]) -> object:
    import pyarrow as pa

    kinds = {type(value) for value in values if value is not None}
    if kinds and kinds <= {int, float}:
        return pa.int64() if kinds == {int} else pa.float64()
    return pa.string()


def _markdown(table: Table) -> bytes:
    header, lines = _show(table)
    return utf8(f"{markdown_table(header, lines)}\n")


_LATEX = {
    "\\": r"\textbackslash{}",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "'": r"\textquotesingle{}",
    "`": r"\textasciigrave{}",
    "-": "{-}",
    "ε": r"$\varepsilon$",
    "η": r"$\eta$",
    "±": r"$\pm$",
    "\u00d7": r"$\times$",
    "é": r"\'e",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}


def latex(text: str) -> str:
    """Text that LaTeX prints as it is: in one line, special characters escaped. Brackets at the beginning of a cell
    would be read as an option of the line end before it."""
    escaped = "".join(_LATEX.get(character, character) for character in " ".join(text.split()))
    return f"{{}}{escaped}" if escaped.startswith(("[", "*")) else escaped


def _tex(table: Table) -> bytes:
    header, lines = _show(table)
    alignment = "".join("l" if k < 2 else "r" for k in range(len(header)))
    rows = [" & ".join(map(latex, line)) + r" \\" for line in lines]
    long = len(lines) > 40
    name = "longtable" if long else "tabular"
    text = [
        f"% {_comment(table.caption or table.title)}",
        r"% \usepackage[T1]{fontenc} \usepackage{booktabs}" + (r" \usepackage{longtable}" if long else ""),
        rf"\begin{{{name}}}{{{alignment}}}",
        r"\toprule",
        " & ".join(map(latex, header)) + r" \\",
        r"\midrule",
        *([r"\endhead"] if long else []),
        *rows,
        r"\bottomrule",
        rf"\end{{{name}}}",
    ]
    return utf8("\n".join(text) + "\n")


def _comment(text: str) -> str:
    return " ".join(text.split())


_WRITERS: dict[str, Callable[[Table], bytes]] = {
    "csv": _csv,
    "parquet": _parquet,
    "json": _json,
    "tex": _tex,
    "md": _markdown,
}
