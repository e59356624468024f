"""Guarded classifiers as a table: a line per attack, those that ignore the detector beside those that know it."""

from collections.abc import Sequence
from dataclasses import dataclass

from robbench.metrics.accuracy import ACCURACY
from robbench.metrics.detection import DETECTION_METRICS
from robbench.results.rows import OBLIVIOUS, TableRow, cell_status
from robbench.store.records import CellResult, Run

KEYS = ("model", "detector", "attack")
METRIC_NAMES = (ACCURACY.name, *(metric.name for metric in DETECTION_METRICS))
TITLES = ("robust accuracy with rejection", *(metric.column for metric in DETECTION_METRICS))
CAPTION = (
    "Robust accuracy with rejection: the clean image is right and accepted, the attacked one right or flagged. "
    "ACC-NADV: natural and noisy images that are accepted; ACC-COM: attacked images that are flagged or right, and a "
    "detector that flags everything has 100. Without detector: the accuracy of the classifier alone on the same "
    "images. Clean, accepted and attacked, accepted: accuracy among accepted images. AUROC, AUPR and TPR at 5 % "
    "FPR: attacked images that fool the classifier against natural and noisy ones. An oblivious attack ignores the "
    "detector, an adaptive one knows it; only the latter says what an attacker leaves of it."
)


@dataclass(frozen=True)
class DetectionLine:
    """One guarded model under one attack.

    Attributes:
        model, detector, attack: names.
        adaptive: whether the attack knows the detector.
        oblivious: whether no adaptive attack on the model was finished.
        status: of the cell.
        cells: numbers in the order of `METRIC_NAMES`; None where the samples give none.
    """

    model: str
    detector: str
    attack: str
    adaptive: bool
    oblivious: bool
    status: str
    cells: tuple[TableRow | None, ...]

    @property
    def names(self) -> tuple[str, str, str]:
        """Model, attack, and what the attack knows."""
        return self.model, self.attack, "adaptive" if self.adaptive else "oblivious"

    def text(self, place: int) -> str:
        """The number at `place` with its interval, "-" where the samples give none, or the status of the cell."""
        cell = self.cells[place]
        if self.status != "ok":
            return self.status
        if cell is None or cell.value is None or cell.lower is None or cell.upper is None:
            return "-"
        return f"{cell.value:.1f} [{cell.lower:.1f}, {cell.upper:.1f}]"


@dataclass(frozen=True)
class DetectionTable:
    """Lines of one model together, oblivious attacks first; notes: one per model without an adaptive attack."""

    lines: tuple[DetectionLine, ...]

    @property
    def header(self) -> tuple[str, ...]:
        """Titles of `DetectionLine.names` and the numbers."""
        return ("model", "attack", "the attack is", *TITLES)

    @property
    def notes(self) -> list[str]:
        """What must be known of the models."""
        bare = dict.fromkeys(line.model for line in self.lines if line.oblivious)
        return [f"{model}: {OBLIVIOUS}" for model in bare]


def detection_table(run: Run, rows: Sequence[TableRow]) -> DetectionTable:
    """The guarded models of a run. rows: of its leaderboard."""
    found = {(row.model, row.attack, row.metric): row for row in rows}
    guarded = [result for result in run.cells if result.cell.detector is not None]
    names = list(dict.fromkeys(result.cell.model for result in guarded))
    ordered = sorted(guarded, key=lambda one: (names.index(one.cell.model), one.cell.is_adaptive))
    return DetectionTable(tuple(_line(run, result, found) for result in ordered))


def _line(run: Run, result: CellResult, found: dict[tuple[str, str, str], TableRow]) -> DetectionLine:
    cell = result.cell
    cells = tuple(found.get((cell.model, cell.attack.label, name)) for name in METRIC_NAMES)
    return DetectionLine(
        model=cell.model,
        detector=cell.detector.name if cell.detector else "",
        attack=cell.attack.label,
        adaptive=cell.is_adaptive,
        oblivious=cells[0] is not None and cells[0].oblivious,
        status=cell_status(run, result)[0],
        cells=cells,
    )
