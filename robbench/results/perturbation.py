"""Distances of adversarial images from their originals (`metrics.distance`), and Fréchet distances from the data."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from robbench.metrics.distance import Measured, attacked_size, broken_size
from robbench.results.rows import TableRow, blank_row, cell_status
from robbench.statistics.perturbation import PerturbationSize
from robbench.store.frechet_records import CLEAN, FRECHET_FOLDER, FrechetRecord, load_frechet
from robbench.store.records import CellResult, Run

NOT_SCORED = "no images were scored yet; robbench fid RUN scores a run made with --keep-examples all"
NOT_RUN = "not run"


def measure_sizes(run: Run, result: CellResult) -> list[Measured]:
    """The distances of a complete cell: attacked, then broken; empty sets are left out."""
    if cell_status(run, result)[0] != "ok":
        return []
    return [found for found in (attacked_size(result), broken_size(result)) if found]


def frechet_rows(run: Run) -> list[TableRow]:
    """One row per Fréchet distance, metric "fid" or "frechet[<model>]"; the clean images have model "" and attack
    "clean"."""
    table = distances(run)
    by_hash = {result.cell.hash: result for result in run.cells}
    rows = []
    for record in table.records:
        blank = _frechet_blank(run, by_hash.get(record.cell or ""))
        metric = table.label(record)
        metric = "fid" + metric.removeprefix("FID") if metric.startswith("FID") else metric
        row = replace(blank, metric=metric, value=record.value, status=record.status, reason=record.reason)
        rows.append(row if record.reason else replace(row, remarks=record.notes))
    return rows


def _frechet_blank(run: Run, result: CellResult | None) -> TableRow:
    """A row of a cell, or (None) of the run's clean images, without a value."""
    row = blank_row(run, result or run.cells[0], metric="", unit="distance")
    if result is not None:
        return row
    return replace(
        row,
        model="",
        defense="",
        threat_model=CLEAN,
        attack=CLEAN,
        epsilon=None,
        eta=None,
        model_sha256="",
        flow="",
    )


@dataclass(frozen=True)
class Distances:
    """The Fréchet distances of a run. columns: one per extractor; only "FID" when nothing was scored."""

    records: tuple[FrechetRecord, ...]
    columns: tuple[str, ...]

    def label(self, record: FrechetRecord) -> str:
        """The extractor's name, with a part of its hash where two extractors have one name."""
        hashes = {r.extractor_hash for r in self.records if r.extractor == record.extractor}
        return record.extractor + (f" ({record.extractor_hash[:8]})" if len(hashes) > 1 else "")

    def of_cell(self, cell: str | None) -> list[FrechetRecord | None]:
        """The records of a cell (None: the clean images), one per column."""
        found = {self.label(record): record for record in self.records if record.cell == cell}
        return [found.get(column) for column in self.columns]

    @property
    def floor(self) -> tuple[str, ...]:
        """Distances of the clean images, in one line; empty when nothing was scored."""
        found = [record for record in self.of_cell(None) if record is not None and record.value is not None]
        texts = [f"{self.label(record)} {record.value:.2f}" for record in found]
        return (f"Clean images of the same samples: {', '.join(texts)}.",) if texts else ()


def distances(run: Run) -> Distances:
    """The distances that `robbench fid` stored for the run's plan; `UserError` for a damaged record."""
    folders = [f for f in run.frechet_folders or (run.folder,) if (f / FRECHET_FOLDER).is_dir()]
    found: dict[tuple[str, str | None], FrechetRecord] = {}
    for record in (record for folder in folders for record in load_frechet(folder)):
        key = record.extractor_hash, record.cell
        if key not in found or found[key].value is None:
            found[key] = record
    records = tuple(found.values())
    named = Distances(records, ())
    return replace(named, columns=tuple(dict.fromkeys(map(named.label, records))) or ("FID",))


@dataclass(frozen=True)
class SizeTable:
    """Perturbation sizes as texts. footnotes: numbered as in the last columns."""

    header: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]
    footnotes: tuple[str, ...]


SIZE_CAPTION = (
    "L2 and Linf: mean ± standard deviation over samples, pixels in [0, 1]. Attacked: right before the attack (of a "
    "flow, and by a perturbation, all are); broken: those of them that the attack broke. FID and other Fréchet "
    "distances: all images of the cell to the training images."
)


def size_table(run: Run) -> SizeTable:
    """The sizes of every cell, after a line with the Fréchet distances of the clean images if there are any."""
    scored, notes = distances(run), Footnotes()
    lines: list[tuple[str, ...]] = []
    if scored.records:
        lines.append(("", CLEAN, f"all {run.n}", "-", "-", *notes.texts(scored.of_cell(None))))
    for result in run.cells:
        lines += _size_lines(run, result, notes.texts(scored.of_cell(result.cell.hash)))
    header = ("model", "attack", "samples", "L2", "Linf", *scored.columns)
    return SizeTable(header, tuple(lines), notes.lines)


def _size_lines(run: Run, result: CellResult, scores: Sequence[str]) -> list[tuple[str, ...]]:
    """All samples and their Fréchet distances, then the broken ones."""
    cell, sizes = result.cell, measure_sizes(run, result)
    if not sizes:
        status = cell_status(run, result)[0]
        words = ["-" if status == "ok" else status] * 2
        return [(cell.model_name, cell.attack.label, "", *words, *scores)]
    empty = [""] * len(scores)
    return [
        (cell.model_name, cell.attack.label, f"{m.samples} {m.size.n}", *size_texts(m.size), *last)
        for m, last in zip(sizes, [scores, *[empty] * (len(sizes) - 1)], strict=True)
    ]


def size_texts(size: PerturbationSize) -> tuple[str, str]:
    """L2 and Linf as "1.303 ± 0.120"."""
    return f"{size.l2_mean:.3f} ± {size.l2_std:.3f}", f"{size.linf_mean:.3f} ± {size.linf_std:.3f}"


class Footnotes:
    """Numbers notes in order of appearance, each text once."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    @property
    def lines(self) -> tuple[str, ...]:
        """ "[1] the cell failed"."""
        return tuple(f"[{number}] {note}" for note, number in self._numbers.items())

    def texts(self, records: Sequence[FrechetRecord | None]) -> list[str]:
        """ "72.12 [1]" or "not run [2]" per record; None for a record that is missing."""
        return [self._text(record) for record in records]

    def _text(self, record: FrechetRecord | None) -> str:
        value = NOT_RUN if record is None or record.value is None else f"{record.value:.2f}"
        reasons = [NOT_SCORED] if record is None else [*record.notes, *filter(None, [record.reason])]
        marks = [self._numbers.setdefault(reason, len(self._numbers) + 1) for reason in reasons]
        return " ".join([value, *(f"[{mark}]" for mark in marks)])
