"""Where numbers come from: the commands that compute them again, versions, seed, device, time and hashes."""

from collections.abc import Sequence
from dataclasses import replace

from robbench.report.site.groups import Group
from robbench.report.site.page import Provenance
from robbench.results import reproduce, wording
from robbench.store.records import CellRecord, CellResult

NAMED = 6  # models or flows that are listed with their hashes; the downloads have those of all


def provenance(
    group: Group, cells: Sequence[CellResult] | None = None, commands: Sequence[str] | None = None
) -> Provenance:
    """What stands below a page. cells: those its numbers come from, default all of `group`. commands: default the
    `robbench run` lines of `cells`."""
    chosen = group.run.cells if cells is None else list(cells)
    records = [result.cell for result in chosen]
    facts = [
        ("Data", f"{group.run.dataset}, {group.run.n:,} test images, revision {group.run.dataset_revision}"),
        ("Seed", f"{group.run.seed}, of the draw of test images and of the attacks"),
        ("Runs", ", ".join(_runs(group, records))),
        ("Versions", wording.versions(group.run)),
        ("Engine", _list(dict.fromkeys(record.engine for record in records), "engines")),
        ("Device", _devices(records)),
        ("Computing time", duration(sum(result.cell.seconds for result in chosen))),
        ("Weights", _list(_weights(records), "models")),
        ("Flow", _list(_flows(records), "flows")),
    ]
    lines = _commands(group, records) if commands is None else commands
    return Provenance(tuple(lines), tuple((name, text) for name, text in facts if text))


def _runs(group: Group, records: Sequence[CellRecord]) -> dict[str, None]:
    """Names of the runs that have some of the cells."""
    keys = [(record.hash, record.attack.label) for record in records]
    return {
        run.folder.name: None
        for run, places in zip(group.sources, group.places, strict=True)
        if any(key in places for key in keys)
    }


def _commands(group: Group, records: Sequence[CellRecord]) -> list[str]:
    """The lines of every run for the cells that no run before it has."""
    left = {(record.hash, record.attack.label) for record in records}
    lines: list[str] = []
    for run, places in zip(group.sources, group.places, strict=True):
        found = left & places.keys()
        mine = [run.cells[k] for k in sorted(k for key in found for k in places[key])]
        left -= found
        lines += reproduce.commands(replace(run, cells=mine)) if mine else []
    return list(dict.fromkeys(lines))


def _devices(records: Sequence[CellRecord]) -> str:
    found = dict.fromkeys(record.device or "not recorded" for record in records if record.status != "running")
    return ", ".join(found)


def _weights(records: Sequence[CellRecord]) -> dict[str, None]:
    found = dict.fromkeys(f"{record.model_name} sha256 {record.model_sha256}" for record in records)
    guards = (record.detector for record in records if record.detector)
    return found | dict.fromkeys(f"detector {guard.name} sha256 {guard.sha256}" for guard in guards)


def _flows(records: Sequence[CellRecord]) -> dict[str, None]:
    flows = [flow for record in records for flow in (record.attack_flow, record.nll_flow) if flow]
    return dict.fromkeys(f"{flow.name} sha256 {flow.sha256}" for flow in flows)


def _list(entries: dict[str, None], noun: str) -> str:
    if len(entries) > NAMED:
        return f"{len(entries)} {noun}; their hashes are in the tables to download"
    return "; ".join(entries)


def duration(seconds: float) -> str:
    """ "42.0 s", "12.3 min", "5.1 h" of one process; "not recorded" for 0."""
    for size, unit in ((3600, "h"), (60, "min"), (1, "s")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.2f} s" if seconds else "not recorded"
