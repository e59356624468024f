"""What a figure is computed from: a model of a run, and the images that the run keeps of its attacks."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from robbench.attacks import Victim
from robbench.core.device import resolve_device
from robbench.core.errors import UserError, known_name
from robbench.models.entry import ZooEntry
from robbench.models.loading import load_model
from robbench.models.zoo import zoo_entries
from robbench.store.columns import decode_images
from robbench.store.figure_records import Cell
from robbench.store.ledger import Ledger
from robbench.store.records import CellResult, Run

BATCH = 256
AGAIN = "run it again with --keep-examples all --fresh, then robbench figure"


@dataclass(frozen=True)
class FigureRequest:
    """Arguments of `robbench figure`. None means the default.

    Attributes:
        models: names in the run; () for all its classifiers.
        attacks: labels in the run, of attacked images; () for all that kept images.
        n: stored images, at most; None for all.
        extent: how far a loss surface goes to each side; None for the largest Linf budget of the run.
        points: of a loss surface, along each direction.
        zoo: folder of further models.
        device: "auto", "cpu", "cuda" or "cuda:N".
    """

    models: tuple[str, ...] = ()
    attacks: tuple[str, ...] = ()
    n: int | None = None
    extent: float | None = None
    points: int = 21
    zoo: Path | None = None
    device: str = "auto"


@dataclass(frozen=True)
class Numbers:
    """The numbers of a figure: columns, rows, and what a reader must know. n: images that they are of. options: of the
    command, with defaults filled in."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    facts: tuple[str, ...]
    n: int
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Subject:
    """A classifier of a run, and the run's stored clean images.

    Attributes:
        name: of the model.
        run: the run; cells: those of the model.
        victim: the model on its device.
        ids, images, labels: of the samples that the run keeps, by id: [N], [N,C,H,W] in [0,1], [N].
    """

    name: str
    run: Run
    cells: tuple[CellResult, ...]
    victim: Victim
    ids: tuple[int, ...]
    images: Tensor
    labels: Tensor

    def attacked(self, cell: CellResult) -> dict[int, Tensor]:
        """Attacked images [C,H,W] of a cell by sample id, of the subject's samples that it keeps."""
        rows = cell.rows[cell.rows["example"].notna() & cell.rows["sample_id"].isin(self.ids)]
        images = torch.from_numpy(decode_images(list(rows["example"]), self.run.shape))
        return dict(zip(map(int, rows["sample_id"]), images, strict=True))


def find_subjects(run: Run, request: FigureRequest) -> list[Callable[[], Subject]]:
    """Functions that load the requested classifiers of a run, each with its images; `UserError`, before anything is
    loaded, for unknown names, models that are not at hand, and a run that keeps no images."""
    by_model: dict[str, list[CellResult]] = {}
    for result in run.cells:
        card = run.cards.get(result.cell.model_name)
        if card is not None and card.kind == "classifier" and result.cell.status != "failed":
            by_model.setdefault(result.cell.model_name, []).append(result)
    names = [known_name("model", name, by_model, "or leave --model out") for name in request.models]
    names = names or list(by_model)
    if not names:
        raise UserError(f"{str(run.folder)!r} has no finished cell of a classifier; run attacks on one first")
    stored = Ledger(run.folder).originals()
    if not stored:
        raise UserError(f"{str(run.folder)!r} keeps no images; {AGAIN}")
    entries = zoo_entries(request.zoo)
    chosen = [(name, _entry(run, name, entries)) for name in names]
    device = resolve_device(request.device)

    def load(name: str, entry: ZooEntry) -> Subject:
        rows = pd.concat([result.rows for result in by_model[name]])
        labels = dict(zip(rows["sample_id"].tolist(), rows["label"].tolist(), strict=True))
        ids = tuple(sorted(stored.keys() & labels.keys()))[: request.n]
        if not ids:
            raise UserError(
                f"{str(run.folder)!r} keeps no image of a sample that {name!r} was attacked on; {AGAIN}"
            )
        images = torch.stack([torch.from_numpy(stored[i]) for i in ids])
        true = torch.tensor([labels[i] for i in ids])
        victim = Victim(load_model(entry, device).module, device, BATCH)
        return Subject(name, run, tuple(by_model[name]), victim, ids, images, true)

    return [lambda name=name, entry=entry: load(name, entry) for name, entry in chosen]  # type: ignore[misc]


def _entry(run: Run, name: str, entries: dict[str, ZooEntry]) -> ZooEntry:
    """The zoo's model of a name, if it is the run's; else `UserError`."""
    card, entry = run.cards.get(name), entries.get(name)
    if card is None or entry is None:
        raise UserError(
            f"model {name!r} of the run is not in the zoo; name the folder around its own with --zoo"
        )
    entry = entry if entry.card.logits else entry.restricted(run.data.classes if run.data else None)
    if entry.card.function_hash != card.function_hash:
        raise UserError(
            f"{entry.folder} is another model than the run's {name!r}; name the folder of the run's models with --zoo"
        )
    return entry
