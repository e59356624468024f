"""RUN/figures/*.json: the numbers of a figure about one model of a run, as typed records. No torch here."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from robbench.core.schema import Strict
from robbench.specs import SHA256
from robbench.store.record_files import RECORD_VERSION, read_json_record, write_json_record

FIGURES_FOLDER = "figures"
NEXT_STEP = "run robbench figure again, or delete the file"
FigureName = Literal["embedding", "loss-surface"]
Cell = Annotated[float, Field(allow_inf_nan=False)] | int | str


class FigureRecord(Strict):
    """The numbers of a figure, as the file for download and the picture have them.

    Attributes:
        schema_version: of the record file.
        figure: what it shows.
        model, model_hash: name in the run, and function hash of its card.
        dataset, n, seed: number of images, and seed of what is random.
        columns, rows: the numbers.
        facts: what a reader must know, a sentence each.
        command: that computes it again, without places.
    """

    schema_version: Literal[1, 2] = RECORD_VERSION
    figure: FigureName
    model: str
    model_hash: SHA256
    dataset: str
    n: int = Field(gt=0)
    seed: int
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...] = Field(min_length=1)
    facts: tuple[str, ...]
    command: str

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if any(len(row) != len(self.columns) for row in self.rows):
            raise ValueError(f"a row has another number of cells than the {len(self.columns)} columns")
        return self

    def column(self, name: str) -> list[Cell]:
        """The values of a column."""
        place = self.columns.index(name)
        return [row[place] for row in self.rows]

    def numbers(self, name: str) -> list[float]:
        """The values of a column of numbers."""
        return [float(value) for value in self.column(name)]


def figure_path(folder: Path, record: FigureRecord, ending: str = "json") -> Path:
    """The file of a figure in the run `folder`."""
    return folder / FIGURES_FOLDER / f"{record.figure}-{record.model_hash[:16]}.{ending}"


def write_figure(folder: Path, record: FigureRecord) -> Path:
    """Store a figure's record in the run `folder`, in place of an earlier one; returns its path."""
    path = figure_path(folder, record)
    write_json_record(path, record)
    return path


def read_figures(folders: Sequence[Path]) -> list[FigureRecord]:
    """The figures of runs, each once; `UserError` for a record that is malformed or was edited."""
    paths = (path for folder in folders for path in sorted((folder / FIGURES_FOLDER).glob("*.json")))
    found = (read_json_record(path, FigureRecord, NEXT_STEP) for path in paths)
    return list({(record.figure, record.model_hash): record for record in found}.values())
