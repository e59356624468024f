"""Cells that earlier commands left in the run folder: those on the same samples stay in its tables."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from robbench.cards import ModelCard
from robbench.core.errors import UserError
from robbench.core.schema import load_yaml
from robbench.store.ledger import CELL_FILE, Ledger, refuse_shard
from robbench.store.record_files import read_json_record
from robbench.store.records import CellRecord, PlanEntry, RunFile

NAMED = 4


@dataclass(frozen=True)
class Joined:
    """run: a plan with the earlier cells that its tables can show. left_out: those they cannot, "model x attack"."""

    run: RunFile
    left_out: tuple[str, ...] = ()

    def line(self, folder: Path) -> str:
        """What to say of the cells left out; "" where there are none."""
        count = len(self.left_out)
        if not count:
            return ""
        more = f" and {count - NAMED} more" if count > NAMED else ""
        cells = "1 earlier cell" if count == 1 else f"{count} earlier cells"
        return (
            f"Not in these tables: {cells} of {folder} ({', '.join(self.left_out[:NAMED])}{more}), on other samples, "
            f"unfinished, or computed with other weights or settings; to see them, run their command with another --out"
        )


def join_earlier(run: RunFile, cards: Mapping[str, ModelCard], folder: Path) -> Joined:
    """The plan `run` of models with `cards`, joined by every cell in `folder` that is complete on exactly its samples,
    belongs to the same data set and seed, and is of a model that is still the one of that name."""
    ledger = Ledger(folder)
    try:
        existing = ledger.read_run(edited=True)
    except UserError:
        return Joined(run)
    if existing is None or existing.differences(run) or existing.note != run.note:
        return Joined(run)
    taken, left_out = {(entry.model, entry.attack) for entry in run.cells}, []
    added: list[PlanEntry] = []
    for place, record in _others(ledger, {entry.hash[:16] for entry in run.cells}):
        if record is None:
            left_out.append(place)
            continue
        key = record.model, record.attack.label
        if key in taken or not _fits(record, run, cards, ledger):
            left_out.append(" x ".join(key))
            continue
        taken.add(key)
        added.append(
            PlanEntry(
                hash=record.hash, model=record.model, defense=record.defense, attack=record.attack.label
            )
        )
    return Joined(_joined(run, added, existing), tuple(left_out))


def _joined(run: RunFile, added: Sequence[PlanEntry], existing: RunFile) -> RunFile:
    """The cells of the existing plan keep their order, new ones come after them; models outermost."""
    order = [entry.hash for entry in existing.cells]
    cells = sorted([*run.cells, *added], key=lambda e: order.index(e.hash) if e.hash in order else len(order))
    models = tuple(dict.fromkeys(entry.model for entry in cells))
    given = {**existing.given, **run.given}
    changes = {
        "cells": tuple(sorted(cells, key=lambda entry: models.index(entry.model))),
        "models": models,
        "attacks": tuple(dict.fromkeys(entry.attack for entry in cells)),
        "given": {name: given[name] for name in models if name in given},
    }
    return run.model_copy(update=changes)


def _others(ledger: Ledger, own: set[str]) -> Iterator[tuple[str, CellRecord | None]]:
    """(folder, record) of the cells in no folder of `own`; None for a record that cannot be read."""
    for path in sorted(ledger.folder.glob(f"cells/*/{CELL_FILE}")):
        if path.parent.name in own:
            continue
        try:
            record = read_json_record(path, CellRecord, "")
        except UserError:
            yield path.parent.name, None
            continue
        yield path.parent.name, record if ledger.cell_folder(record.hash) == path.parent else None


def _fits(record: CellRecord, run: RunFile, cards: Mapping[str, ModelCard], ledger: Ledger) -> bool:
    if (record.status, record.dataset, record.dataset_revision, record.seed) != (
        "ok",
        run.dataset,
        run.dataset_revision,
        run.seed,
    ):
        return False
    try:
        card = cards.get(record.model) or load_yaml(
            ledger.folder / "cards" / f"{record.model}.yaml", ModelCard
        )
        ids = {i for shard in ledger.shards(record.hash, refuse_shard) for i in shard.ids}
    except UserError:
        return False
    return record.model_hash == card.function_hash and ids == {*run.sample_ids}
