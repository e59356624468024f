"""Reading reference tables: CSV files with at least the columns dataset, model, attack, metric and value.

That is what leaderboard.csv and reports/published/*.csv are. The rest is optional and narrows a comparison:

* threat_model, epsilon, eta: part of the key. A reference without the column matches whatever the run has, and is an
  error when that is more than one row. An empty epsilon or eta means "has none".
* n, seed: which samples were measured; with both, "the same samples" can be told from others.
* lower, upper: the reference's own interval.
* tolerance: largest allowed |measured - reference| in the metric's unit; beats every policy.
* status: a row that is neither "ok" nor "partial" holds no number, nor does one with an empty value.
* gate: a row with "false" is compared and shown and never fails a check.
* source: where a published number was printed; such a row is never updated.
* measure: which accuracy a number is. A leaderboard.csv of before it had the column holds robust accuracies.
* combined: what a worst case or average combines, "clean, pgd20, aa". scope: the samples that a mean speaks of.
  near_ties: samples whose verdict another machine may decide otherwise. A leaderboard.csv of before these columns says
  them in its note only, which nothing reads: its worst cases and averages are not compared.
"""

import csv
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from robbench.compare.keys import Budget
from robbench.core.errors import UserError
from robbench.core.spreadsheet import plain_cell
from robbench.results import corruptions
from robbench.results.rows import AVERAGE, CLEAN, WORST_CASE, RowStatus, TableRow

REQUIRED = ("dataset", "model", "attack", "metric", "value")


@dataclass(frozen=True)
class Reference:
    """One number of a reference table. None: the column is absent, or the cell empty.

    Attributes:
        line: in `path`, from 1.
        dataset, model, attack, metric, threat_model: they name the number.
        value: None where there is none.
        epsilon, eta: None only without the column; an empty cell is "none", for it says that there is no budget.
        n, seed: which samples were measured.
        tolerance: largest allowed difference, in the metric's unit.
        combined: what a worst case or average combines; empty for anything else.
        lower, upper: the reference's own interval.
        gate: whether a difference fails a check.
        source: where a published number was printed.
        scope: the samples that a mean speaks of; "" where it is over all or not said.
        near_ties: samples whose verdict another machine may decide otherwise.
        stated: whether the table can say what a number combines.
        rounding: half of the last digit that `value` was written with.
        measure: which accuracy it is; "" where that is not said.
        path: the table.
    """

    line: int
    dataset: str
    model: str
    attack: str
    metric: str
    value: float | None
    threat_model: str | None
    epsilon: Budget
    eta: Budget
    n: int | None
    seed: int | None
    tolerance: float | None
    combined: frozenset[str]
    lower: float | None = None
    upper: float | None = None
    gate: bool = True
    source: str = ""
    scope: str = ""
    near_ties: int = 0
    stated: bool = True
    rounding: float = 0.0
    measure: str = ""
    path: Path = field(default_factory=Path)

    @property
    def status(self) -> RowStatus:
        """As of any number: "ok" where there is one."""
        return "not run" if self.value is None else "ok"

    @property
    def note(self) -> str:
        """A table's notes are for people and not read."""
        return ""


def read_references(path: Path) -> list[Reference]:
    """The rows of a reference CSV, or of all CSV files in a folder, files in name order. `UserError` as
    `read_reference`."""
    if not path.is_dir():
        return read_reference(path)
    files = sorted(path.glob("*.csv"))
    if not files:
        raise UserError(
            f"--against {str(path)!r} is a folder without CSV files; give a table, or a folder of tables"
        )
    return [row for file in files for row in read_reference(file)]


def read_reference(path: Path) -> list[Reference]:
    """The rows of a reference CSV; `UserError` naming file, line and column for anything malformed."""
    header, rows = read_csv(path)
    missing = [name for name in REQUIRED if name not in header]
    if missing:
        raise UserError(
            f"--against {str(path)!r} lacks the columns {', '.join(missing)}; "
            f"give a tidy table like leaderboard.csv"
        )
    if not rows:
        raise UserError(f"--against {str(path)!r} has no rows; give a table with numbers to compare with")
    return [_reference(_Cells(path, number, dict(zip(header, line, strict=True)))) for number, line in rows]


def read_csv(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Header, and (line number, stripped cells) of every row that is not empty."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream, strict=True)
            lines = [(reader.line_num, line) for line in reader]
    except OSError as error:
        raise UserError(
            f"--against {str(path)!r} cannot be read ({error.strerror}); give a CSV file"
        ) from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"--against {str(path)!r} is not CSV text ({error}); give a tidy CSV file") from error
    header = lines[0][1] if lines else []
    repeated = sorted(name for name, count in Counter(header).items() if count > 1)
    if repeated:
        raise UserError(f"--against {str(path)!r} has two columns {repeated[0]!r}; remove one")
    rows = [(number, [plain_cell(cell).strip() for cell in line]) for number, line in lines[1:] if line]
    for number, line in rows:
        if len(line) != len(header):
            raise UserError(
                f"{path}, line {number}: {len(line)} cells for {len(header)} columns; repair the file"
            )
    return header, rows


def write_cell(row: TableRow, column: str) -> str | float | int | None:
    """A cell of leaderboard.csv."""
    value = row.cell(column)
    return round_number(value) if column in ("value", "lower", "upper") and value is not None else value


def round_number(value: str | float) -> float:
    """Twelve digits of a number in a CSV file, so that 571 of 1000 are 57.1."""
    return float(f"{float(value):.12g}")


def _reference(row: "_Cells") -> Reference:
    cells = row.cells
    has_value = cells.get("status", "ok") in ("ok", "partial")
    combines = cells["attack"] in (WORST_CASE, AVERAGE)
    allowed = row.real("tolerance")
    if allowed is not None and not (math.isfinite(allowed) and allowed >= 0):
        raise UserError(f"{row.where}: tolerance {allowed} is none; give a finite number of at least 0")
    return Reference(
        path=row.path,
        line=row.line,
        dataset=cells["dataset"],
        model=cells["model"],
        attack=cells["attack"],
        metric=cells["metric"],
        value=row.real("value") if has_value else None,
        threat_model=cells.get("threat_model"),
        epsilon=row.budget("epsilon"),
        eta=row.budget("eta"),
        n=row.count("n"),
        seed=row.whole("seed"),
        tolerance=allowed,
        combined=frozenset(filter(None, cells.get("combined", "").split(", "))),
        lower=row.real("lower"),
        upper=row.real("upper"),
        gate=row.truth("gate"),
        source=cells.get("source", ""),
        scope=cells.get("scope", ""),
        near_ties=row.whole("near_ties") or 0,
        stated="combined" in cells or "model_sha256" not in cells or not combines,
        # A leaderboard.csv, which alone has hashes of models, has all digits that count: its 57.1 is not 57.14.
        rounding=0.0 if "model_sha256" in cells else _half_digit(cells["value"]),
        measure=cells.get("measure", _measure_of_before(cells)),
    )


def _measure_of_before(cells: Mapping[str, str]) -> str:
    """Which accuracy a line without a measure is: "" (whatever the run shows), but in a leaderboard.csv, which alone
    has hashes of models, that of an attack was robust accuracy, corrupted images aside."""
    searched = cells["attack"] != CLEAN and cells.get("threat_model") not in corruptions.THREAT_MODELS
    return "robust accuracy" if "model_sha256" in cells and cells["metric"] == "accuracy" and searched else ""


def _half_digit(text: str) -> float:
    """0.005 for "12.34", 0.5 for "12"; 0 for what is no plain decimal."""
    _, _, decimals = text.partition(".")
    plain = text.lstrip("+-").replace(".", "", 1)
    return 0.5 * 10.0 ** -len(decimals) if plain.isascii() and plain.isdecimal() else 0.0


@dataclass(frozen=True)
class _Cells:
    """Numbers of one line of a CSV, with errors that say where."""

    path: Path
    line: int
    cells: Mapping[str, str]

    @property
    def where(self) -> str:
        return f"{self.path}, line {self.line}"

    def real(self, column: str) -> float | None:
        """None when the column is absent or the cell empty."""
        text = self.cells.get(column, "")
        if not text:
            return None
        try:
            return float(text)
        except ValueError as error:
            raise UserError(f"{self.where}: {column} {text!r} is not a number; write it as 12.34") from error

    def whole(self, column: str) -> int | None:
        value = self.real(column)
        if value is not None and not value.is_integer():
            raise UserError(f"{self.where}: {column} {value} is not a whole number")
        return None if value is None else int(value)

    def count(self, column: str) -> int | None:
        value = self.whole(column)
        if value is not None and value < 1:
            raise UserError(f"{self.where}: {column} {value} is no number of samples; give at least 1")
        return value

    def budget(self, column: str) -> Budget:
        """None without the column, "none" for an empty cell."""
        value = self.real(column)
        if value is None:
            return "none" if column in self.cells else None
        if not math.isfinite(value):
            raise UserError(f"{self.where}: {column} {value} is no budget; give a finite number")
        return value

    def truth(self, column: str) -> bool:
        """True without the column or for an empty cell."""
        text = self.cells.get(column, "").lower()
        if text not in ("", "true", "false"):
            raise UserError(f"{self.where}: {column} {text!r} is neither true nor false; write one of them")
        return text != "false"
