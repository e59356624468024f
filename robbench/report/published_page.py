"""Published tables beside runs: what pages show of them, a CSV per table, one Markdown text.

Everything follows from the runs and the shipped tables: the same runs give the same bytes.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from robbench.core.markdown import bullets, escaped, markdown_table, paragraph
from robbench.core.resources import data_root
from robbench.core.spreadsheet import csv_text
from robbench.experiments.comparison import (
    DIGITS,
    VERDICTS,
    Comparison,
    Known,
    Measured,
    compare,
    measured_rows,
)
from robbench.experiments.layout import PrintedTable, printed_table, value_text
from robbench.experiments.published import Paper, PublishedRow, Table, published_index, table_rows
from robbench.experiments.verdicts import Verdict
from robbench.report.facts import PublishedModel, read_published_models
from robbench.results.wording import ANY_ITERATE, summary, versions
from robbench.store.records import Run

if TYPE_CHECKING:
    from rich.table import Table as RichTable

ER_DEFENSES = {"er", "er-at", "er-minus", "e-cla"}  # of which the zoo has no model
_PRINTED = (
    *("source", "row", "column", "dataset", "architecture", "model", "defense", "attack", "threat_model"),
    *("epsilon", "eta", "metric", "unit", "published", "gate", "doubt"),
)
_FOUND = ("recomputed", "difference", "verdict", "reason", "setting")
_OF_THE_RUN = ("value", "lower", "upper", "n", "seed", "model")
_MEASURED = dict(zip(("measured", "lower", "upper", "n", "seed", "measured_model"), _OF_THE_RUN, strict=True))
CSV_COLUMNS = (*_PRINTED, *_MEASURED, "run", *_FOUND)


@dataclass(frozen=True)
class TableComparison:
    """A published table and what runs measured of it."""

    table: Table
    paper: Paper | None
    rows: tuple[PublishedRow, ...]
    comparisons: tuple[Comparison, ...]

    @property
    def counts(self) -> dict[Verdict, int]:
        """Comparisons per verdict, all verdicts in order."""
        found = Counter(comparison.verdict for comparison in self.comparisons)
        return {verdict: found[verdict] for verdict in VERDICTS}

    @property
    def measured(self) -> tuple[Comparison, ...]:
        """The comparisons with a measured number."""
        return tuple(c for c in self.comparisons if c.measured is not None)

    @property
    def command(self) -> str:
        """What runs the table's experiment; empty where there is none."""
        experiment = data_root() / "experiments" / f"{self.table.name}.yaml"
        return f"robbench run --experiment {self.table.name}" if experiment.is_file() else ""

    @property
    def printed(self) -> PrintedTable:
        """The table in its printed shape."""
        return printed_table(self.rows)


def compare_tables(runs: Sequence[Run], known: Known | None = None) -> list[TableComparison]:
    """Every published table of results against all `runs`. known: default `known_names()`."""
    names, index = known or find_known_names(), published_index()
    measured = [row for run in runs for row in measured_rows(run)]
    return [
        _compare(table, index.paper_of(table), measured, names) for table in index.tables if table.has_numbers
    ]


def _compare(
    table: Table, paper: Paper | None, measured: Sequence[Measured], known: Known
) -> TableComparison:
    rows = table_rows(table)
    if table.kind == "sentences":
        reason = "a sentence: see the tables it speaks of"
        found = [Comparison(row, None, None, "not run", reason) for row in rows]
    else:
        found = compare(rows, measured, known)
    return TableComparison(table, paper, tuple(rows), tuple(found))


def find_known_names() -> Known:
    """Attacks, defenses, data sets and models of this installation."""
    from robbench.data.names import dataset_names
    from robbench.models.zoo import zoo_entries
    from robbench.specs import threat_models

    attacks = {name for model in threat_models(None).values() for name in (*model.attacks, *model.groups)}
    zoo = zoo_entries()
    weights = {name: entry.card.weights.sha256[:DIGITS] for name, entry in zoo.items()}
    # Models of the zoo were trained by every shipped defense but ER; the registries themselves would load torch.
    trained = {entry.card.defense for entry in zoo.values()} | ER_DEFENSES
    return Known(attacks, trained | _find_installed_defenses(), dataset_names(), weights)


def _find_installed_defenses() -> set[str]:
    """Names that other packages add; they are looked up without loading any."""
    groups = ("robbench.defenses", "robbench.flow_defenses")
    return {point.name for group in groups for point in entry_points(group=group)}


def table_values(comparison: TableComparison, runs: Sequence[Run], csv: str) -> dict[str, object]:
    """What published_intro.html.j2 and published_sections.html.j2 show of a table. csv: address of its file."""
    return {
        "t": comparison,
        "printed": comparison.printed,
        "lines": [_line(c) for c in comparison.comparisons],
        "any_iterate": ANY_ITERATE,
        "models": _find_known_models(comparison),
        "runs": run_sentences(runs),
        "csv": csv,
    }


def _find_known_models(comparison: TableComparison) -> list[tuple[str, PublishedModel]]:
    """(row, what is known of it) of the models of a table of which more than a name is known."""
    known = read_published_models()
    names = {p.row: p.model for p in comparison.rows if p.model in known}
    return [(row, known[model]) for row, model in names.items()]


def overview_values(comparisons: Sequence[TableComparison], links: Mapping[str, str]) -> dict[str, object]:
    """What published_tables.html.j2 shows. links: address of each table's page by its name."""
    ordered = sorted(comparisons, key=lambda comparison: not comparison.measured)
    return {"tables": ordered, "verdicts": VERDICTS, "links": links}


def run_sentences(runs: Sequence[Run]) -> list[str]:
    """One sentence per run: "digits-seed0, digits: 3 models, ..."."""
    return [f"{run.folder.name}, {run.dataset}: {summary(run)} {versions(run)}." for run in runs]


def terminal_counts(comparisons: Sequence[TableComparison]) -> "RichTable":
    """How many numbers of each table got which verdict; tables of which nothing was measured are one line."""
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    table = RichTable(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, title="Published numbers")
    for name in ("table", *VERDICTS):
        table.add_column(name, justify="left" if name == "table" else "right", overflow="fold")
    for found in comparisons:
        if found.measured:
            table.add_row(Text(found.table.source), *(str(count or "") for count in found.counts.values()))
    rest = [found for found in comparisons if not found.measured]
    left = [sum(found.counts[verdict] for found in rest) for verdict in VERDICTS]
    table.add_row(Text(f"{len(rest)} other tables"), *(str(count or "") for count in left))
    return table


def _line(comparison: Comparison) -> dict[str, str]:
    """A comparison as texts, as pages and Markdown show it."""
    m, p, off = comparison.measured, comparison.published, comparison.difference
    row, digits = m.row if m else None, 3 if p.unit == "bits/dim" else 2
    interval = ""
    if row and row.lower is not None and row.upper is not None:
        interval = f"[{row.lower:.{digits}f}, {row.upper:.{digits}f}]"
    return {
        "row": p.row,
        "column": p.column,
        "published": value_text(p),
        "recomputed": "" if comparison.recomputed is None else f"{comparison.recomputed:.4f}",
        "measured": "" if row is None or row.value is None else f"{row.value:.{digits}f}",
        "interval": interval,
        "n": f"{row.n:,}" if row else "",
        "difference": "" if off is None else f"{off:+.{digits}f}",
        "verdict": comparison.verdict,
        "who": f"{row.model} ({m.run})" if m and row else "",
        "why": _why(comparison),
    }


def _why(comparison: Comparison) -> str:
    if comparison.measured is None:
        return comparison.reason
    ground = [] if comparison.verdict == "differs" else [comparison.reason]
    return "; ".join([*ground, *filter(None, [comparison.setting])])


def comparison_csv(comparison: TableComparison) -> str:
    """One row per published number; numbers keep every digit."""
    lines = [[_cell(found, column) for column in CSV_COLUMNS] for found in comparison.comparisons]
    return csv_text([CSV_COLUMNS, *lines])


def _cell(comparison: Comparison, column: str) -> object:
    p, m = comparison.published, comparison.measured
    if column == "run":
        return m.run if m else None
    if column in _MEASURED:
        return getattr(m.row, _MEASURED[column]) if m else None
    if column in _FOUND:
        return getattr(comparison, column)
    value = p.value if column == "published" else getattr(p, column)
    return str(value).lower() if isinstance(value, bool) else value


def comparison_markdown(comparisons: Sequence[TableComparison], runs: Sequence[Run]) -> str:
    """The tables of which something was measured, and only those rows, as GitHub tables."""
    parts = ["# Published and measured", bullets([*run_sentences(runs), ANY_ITERATE])]
    header = (
        "row",
        "column",
        "published",
        "measured [95 % interval]",
        "n",
        "difference",
        "verdict",
        "model",
        _GROUND,
    )
    for comparison in comparisons:
        if not comparison.measured:
            continue
        text = markdown_table(header, [_texts(_line(found)) for found in comparison.measured])
        shown = {found.verdict for found in comparison.measured}
        left = [f"{n} {verdict}" for verdict, n in comparison.counts.items() if n and verdict not in shown]
        more = [f"Further numbers: {', '.join(left)}."] if left else []
        parts += [f"## {escaped(comparison.table.source)}", paragraph(comparison.table.what), text, *more]
    if len(parts) == 2:
        parts.append("No published number was measured by these runs.")
    return "\n\n".join(parts) + "\n"


_GROUND = "ground and setting"


def _texts(line: Mapping[str, str]) -> list[str]:
    recomputed = f"(recomputed {line['recomputed']})" if line["recomputed"] else ""
    published, measured = (line["published"], recomputed), (line["measured"], line["interval"])
    numbers = [" ".join(filter(None, pair)) for pair in (published, measured)]
    rest = [line[key] for key in ("n", "difference", "verdict", "who", "why")]
    return [line["row"], line["column"], *numbers, *rest]
