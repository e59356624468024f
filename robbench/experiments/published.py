"""Published numbers: tables of papers, leaderboards and authors' checkpoints, as typed rows. No torch here.

`reports/published/index.yaml` lists the tables; a table is `NAME.csv` beside it, one number per row, with the fields of
`PublishedRow` as columns. Settings that papers state are in `settings/`. docs/published.md describes the columns and
how to add a table.
"""

import csv
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Literal, Self, TypeVar

from pydantic import BeforeValidator, Field, PlainSerializer, ValidationError, model_validator

from robbench.core.errors import UserError, unknown_name
from robbench.core.resources import data_root
from robbench.core.schema import Strict, load_yaml
from robbench.core.spreadsheet import plain_cell
from robbench.specs import Name

FOLDER, INDEX, SETTINGS = "published", "index.yaml", "settings"
Origin = Literal["printed", "inferred", "recomputed"]
Kind = Literal["results", "sentences", "hyperparameters", "architectures"]
Unit = Literal[
    "%",
    "percentage points",
    "% of clean accuracy",
    "% of standard accuracy",
    "% (of what, not stated)",
    "bits/dim",
    "distance",
    "pixel range",
    "loss",
    "epsilon",
    "iterations",
    "dimensions",
    "pixels",
    "confidence",
    "examples",
    "attacks",
    "corruptions",
    "not stated",
    "",
]


def _true_or_false(text: object) -> object:
    if text not in ("true", "false", True, False):
        raise ValueError(f"{text!r} is neither true nor false")
    return text in ("true", True)


def _none_if_empty(text: object) -> object:
    return None if text == "" else text


def _split_list(cell: object) -> object:
    return tuple(filter(None, cell.split("; "))) if isinstance(cell, str) else cell


Flag = Annotated[bool, BeforeValidator(_true_or_false)]
Count = Annotated[Annotated[int, Field(ge=1)] | None, BeforeValidator(_none_if_empty)]
Radius = Annotated[Annotated[float, Field(ge=0, allow_inf_nan=False)] | None, BeforeValidator(_none_if_empty)]
Number = Annotated[Decimal | None, BeforeValidator(_none_if_empty)]
Texts = Annotated[tuple[str, ...], BeforeValidator(_split_list)]  # in a file: a; b; c
Remarks = Annotated[Texts, PlainSerializer("; ".join)]
Word = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.@-]*$|^$")]


class PublishedRow(Strict):
    """One published number. Names are robbench's where they exist, else in the same style ("dmat").

    Attributes:
        source: table that prints the number ("IJSAT Table 1").
        row, column: printed labels of its place in the table.
        dataset, architecture, defense, attack, threat_model: setting; empty where there is none, or none is stated.
        model: name of a model that can be loaded; empty for papers' own models.
        train_samples, epochs, n: training images, epochs, test images; None where unknown.
        defense_parameters, attack_parameters: "key=value; key=value".
        epsilon, eta: attacker's budgets, pixels in [0, 1] (of 255 for attacks on a likelihood).
        steps: the attacker's steps.
        metric, unit, better: quantity, unit, and the better direction.
        origin: printed; inferred (lost in the extracted text, taken from elsewhere in the paper); recomputed (here).
        value: with its printed digits; None for a text such as "10-25", which is in printed_as.
        tolerance: largest difference that `robbench check` allows; None for its default.
        gate, doubt: whether a check may fail on the number, and why not.
        combines: attacks of an average, "clean" among them.
        difference_of: labels of two rows; the number is the first minus the second.
        relative_to: clean accuracy in % that a drop is relative to.
        printed_as: the text printed in place of a number.
        note: remarks of the transcription, for people only.
    """

    source: Annotated[str, Field(min_length=1)]
    row: Annotated[str, Field(min_length=1)]
    column: Annotated[str, Field(min_length=1)]
    dataset: Word
    train_samples: Count
    epochs: Count
    architecture: Word
    model: Annotated[str, Field(pattern=r"^\S*$")]
    defense: Word
    defense_parameters: str
    attack: Word
    threat_model: Word
    epsilon: Radius
    eta: Radius
    steps: Count
    attack_parameters: str
    metric: Annotated[str, Field(pattern=r"^[a-z0-9_]+$")]
    origin: Origin
    value: Number
    unit: Unit
    better: Literal["higher", "lower", ""]
    n: Count
    tolerance: Radius
    gate: Flag
    doubt: str
    combines: Texts
    difference_of: Texts
    relative_to: Radius
    printed_as: str
    note: Remarks

    @model_validator(mode="after")
    def _gate_has_grounds(self) -> Self:
        if self.gate and (self.doubt or self.value is None or self.origin != "printed"):
            raise ValueError("gate is true, but the number is doubted, not printed or no number; write false")
        if not self.gate and not self.doubt:
            raise ValueError(
                "gate is false and doubt is empty; say why the number is not held against anybody"
            )
        return self

    @model_validator(mode="after")
    def _says_what_it_is(self) -> Self:
        if (self.value is None) != bool(self.printed_as):
            raise ValueError(
                "value or printed_as is needed, and not both; printed_as is for a text that is no number"
            )
        if self.metric == "average_accuracy" and not self.combines:
            raise ValueError("combines is empty; name the attacks the average is over, as in clean; pgd20")
        if len(self.difference_of) not in (0, 2):
            raise ValueError("difference_of names the two rows of a difference, as in Ours; Theirs")
        return self

    @property
    def derived(self) -> bool:
        """Whether the number follows from others of its table."""
        return bool(self.combines or self.difference_of or self.relative_to)

    @property
    def rounding(self) -> float:
        """Half of the last digit the value was printed with; 0 without a value."""
        exponent = 0 if self.value is None else self.value.as_tuple().exponent
        return 0.0 if self.value is None or not isinstance(exponent, int) else 0.5 * 10.0**exponent


class Hyperparameter(Strict):
    """A setting as a paper states it.

    Attributes:
        source: where it is stated.
        name, parameter, value: its owner, the parameter, and its value, as printed.
        note: remarks of the transcription.
    """

    source: Annotated[str, Field(min_length=1)]
    name: str
    parameter: str
    value: Annotated[str, Field(min_length=1)]
    note: str


class Layer(Strict):
    """A layer, or a whole part, of a network as a paper states it.

    Attributes:
        source: where it is stated.
        name, layer: name of the network, and number of the layer; None where layers are not listed.
        description: as printed.
        note: remarks of the transcription.
    """

    source: Annotated[str, Field(min_length=1)]
    name: str
    layer: Count
    description: Annotated[str, Field(min_length=1)]
    note: str


class Paper(Strict):
    """A paper with tables. where: it was published."""

    title: str
    authors: str = ""
    where: str = ""

    @property
    def citation(self) -> str:
        """ "Authors, Title, where"."""
        return ", ".join(part for part in (self.authors, self.title, self.where) if part)


class Table(Strict):
    """A table of the index.

    Attributes:
        name: of its file.
        source: its name in print.
        what: its subject.
        paper: key of `Index.papers`; empty for one collected from several.
        kind: "results" and "sentences" (numbers of the running text, which no run repeats) have rows of `PublishedRow`.
        context: whether it is a leaderboard of others, shown for comparison only.
    """

    name: Name
    source: str
    what: str
    paper: str = ""
    kind: Kind = "results"
    context: bool = False

    @property
    def has_numbers(self) -> bool:
        """Whether its rows are `PublishedRow`."""
        return self.kind in ("results", "sentences")


class Index(Strict):
    """index.yaml."""

    papers: dict[str, Paper]
    tables: tuple[Table, ...]

    @model_validator(mode="after")
    def _names_fit(self) -> Self:
        unknown = sorted({table.paper for table in self.tables if table.paper} - set(self.papers))
        if unknown:
            raise ValueError(f"tables name the paper {unknown[0]!r}, which papers lacks")
        keys = [key for table in self.tables for key in {_key(table.name), _key(table.source)}]
        if twice := sorted({key for key in keys if keys.count(key) > 1}):
            raise ValueError(f"two tables are called {twice[0]!r}")
        return self

    def paper_of(self, table: Table) -> Paper | None:
        """The paper of a table; None for one collected from several."""
        return self.papers[table.paper] if table.paper else None


def published_folder() -> Path:
    """The shipped `reports/published`."""
    return data_root() / "reports" / FOLDER


def published_index(folder: Path | None = None) -> Index:
    """The index of `folder` (default: the shipped one)."""
    return load_yaml((folder or published_folder()) / INDEX, Index)


def find_table(name: str, index: Index) -> Table | None:
    """The table with name (ijsat-table1) or printed name (IJSAT Table 1) `name`; case and punctuation do not count."""
    requested = _key(name)
    return next((t for t in index.tables if requested in (_key(t.name), _key(t.source))), None)


def published_table(name: str, index: Index) -> Table:
    """`find_table`; `UserError` with the nearest name when there is none."""
    table = find_table(name, index)
    if table is None:
        raise unknown_name("published table", name, [t.name for t in index.tables], "robbench list published")
    return table


def _key(text: str) -> str:
    return "".join(character for character in text.lower() if character.isalnum())


AnyRow = TypeVar("AnyRow", PublishedRow, Hyperparameter, Layer)


def table_rows(table: Table, folder: Path | None = None) -> list[PublishedRow]:
    """The numbers of a table of results or sentences; empty for tables of settings."""
    return read_published(_path(table, folder)) if table.has_numbers else []


def table_settings(table: Table, folder: Path | None = None) -> list[Hyperparameter] | list[Layer]:
    """The rows of a table of settings."""
    if table.kind == "architectures":
        return read_rows(_path(table, folder), Layer)
    return read_rows(_path(table, folder), Hyperparameter)


def _path(table: Table, folder: Path | None) -> Path:
    """Path of a table; settings are in a subfolder, since `robbench check --against` reads the folder as a whole."""
    part = "." if table.has_numbers else SETTINGS
    return (folder or published_folder()) / part / f"{table.name}.csv"


def read_published(path: Path) -> list[PublishedRow]:
    """The rows of a table of results; `UserError` with file, line and column for malformed rows and for two numbers in
    one place."""
    rows = read_rows(path, PublishedRow)
    places: dict[tuple[str, str, str, bool], int] = {}
    for line, row in enumerate(rows, 2):
        place = (row.source, row.row, row.column, row.origin == "recomputed")
        if place in places:
            raise UserError(
                f"{path}, line {line}, column row: {row.row!r} x {row.column!r} of {row.source} stands in line "
                f"{places[place]} already; remove one"
            )
        places[place] = line
    return rows


def read_rows(path: Path, schema: type[AnyRow]) -> list[AnyRow]:
    """The rows of a CSV with the fields of `schema` as columns; `UserError` with file, line and column."""
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            lines = [list(map(plain_cell, line)) for line in csv.reader(stream, strict=True)]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: is not CSV text ({error}); save it as UTF-8 CSV") from error
    _check_header(path, lines[0] if lines else [], list(schema.model_fields))
    return [_row(path, number, line, schema) for number, line in enumerate(lines[1:], 2)]


def _check_header(path: Path, header: Sequence[str], requested: Sequence[str]) -> None:
    for position, (found, name) in enumerate(
        zip([*header, *[""] * len(requested)], requested, strict=False), 1
    ):
        if found != name:
            raise UserError(
                f"{path}, line 1, column {position}: {found!r} stands where {name!r} belongs; "
                f"the columns are {','.join(requested)} (docs/published.md)"
            )
    if len(header) > len(requested):
        raise UserError(
            f"{path}, line 1, column {len(requested) + 1}: {header[len(requested)]!r} is not known; remove it"
        )


def _row(path: Path, number: int, line: Sequence[str], schema: type[AnyRow]) -> AnyRow:
    names = list(schema.model_fields)
    if len(line) != len(names):
        raise UserError(f"{path}, line {number}: {len(line)} cells for {len(names)} columns; repair the line")
    try:
        return schema.model_validate(dict(zip(names, line, strict=True)))
    except ValidationError as error:
        problem = error.errors()[0]
        message = problem["msg"].removeprefix("Value error, ")
        column = str(problem["loc"][0]) if problem["loc"] else message.split()[0]
        shown = "" if not problem["loc"] else f" {line[names.index(column)]!r}"
        raise UserError(f"{path}, line {number}, column {column}{shown}: {message}") from error
