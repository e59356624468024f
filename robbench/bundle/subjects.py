"""The models and flows with which a bundle is verified: the verifier's own, never any of the bundle."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from robbench.bundle.findings import Finding
from robbench.cards import ModelCard
from robbench.core.errors import UserError
from robbench.models.code import pinned
from robbench.models.entry import DetectorEntry, ModelRequest, ZooEntry
from robbench.models.zoo import detector_entries, find_model, guarded_entry, zoo_entries
from robbench.store.records import Run

CHECK = "model"


@dataclass(frozen=True)
class Subjects:
    """The verifier's models for a bundle.

    Attributes:
        models: entries by the bundle's name of the model.
        flows: entries by the sha256 of their weights.
        missing: why a model of the bundle has no entry, by its name.
        findings: on the models compared with the bundle's cards.
        given: entries that the user named, by that name, whose weights must exist.
    """

    models: dict[str, ZooEntry]
    flows: dict[str, ZooEntry]
    missing: dict[str, str]
    findings: tuple[Finding, ...]
    given: dict[str, ZooEntry] = field(default_factory=dict)

    @property
    def flow_cards(self) -> dict[str, ModelCard]:
        """Cards of the flows, by sha256 of their weights."""
        return {sha256: entry.card for sha256, entry in self.flows.items()}


def find_subjects(
    run: Run,
    named: Sequence[str],
    zoo: Path | None = None,
    checkpoints: Path | None = None,
    strict: bool = True,
) -> Subjects:
    """The verifier's models for `run`: among those the user named by `function_hash`, in the zoo also by name.

    A model of the same name that computes something else is a finding that "differs". With `strict`, `UserError` for a
    named model that is not in the bundle.
    """
    logits = run.data.classes if run.data else None
    detectors = detector_entries(zoo)
    entries = zoo_entries(zoo, checkpoints)
    entries = _restricted({**entries, **_guarded(run, detectors, entries)}, logits)
    own = _restricted(_find_named(run, named, entries, detectors, checkpoints), logits)
    models: dict[str, ZooEntry] = {}
    missing: dict[str, str] = {}
    findings = []
    for name, card in run.cards.items():
        # A model that the user named takes precedence over one of the same name in the zoo.
        called = [entry for entry in own.values() if entry.card.name == name]
        called = called or [entry for entry in entries.values() if entry.card.name == name]
        eligible = [*own.values(), *called]
        candidates = [entry for entry in eligible if entry.card.function_hash == card.function_hash]
        if called and not any(entry in candidates for entry in called):
            missing[name] = _foreign(card, called[0])
            findings.append(Finding(name, "", CHECK, "differs", 1, missing[name]))
        elif candidates and (problem := _other_labels(card, candidates[0].card)):
            findings.append(Finding(name, "", CHECK, "differs", 1, problem))
            models[name] = candidates[0]
        elif candidates:
            findings.append(Finding(name, "", CHECK, "agrees", 1))
            models[name] = candidates[0]
        else:
            missing[name] = "not in the zoo under this name and these weights; give --model CARD"
            findings.append(Finding(name, "", CHECK, "unchecked", 0, f"not re-scored: {missing[name]}"))
    listed = [*own.values(), *entries.values()]
    flows = {entry.card.weights.sha256: entry for entry in reversed(listed) if entry.card.kind == "flow"}
    if strict:
        _require_used(run, own, models, missing)
    return Subjects(models, flows, missing, tuple(findings), own)


def _restricted(entries: dict[str, ZooEntry], logits: tuple[int, ...] | None) -> dict[str, ZooEntry]:
    """The models as the run has them: of the logits of its data set's classes."""
    return {
        name: entry if entry.card.logits else entry.restricted(logits)
        for name, entry in entries.items()
        if entry.card.classes is None or entry.card.classes > max(logits or (0,))
    }


def _guarded(
    run: Run, detectors: Mapping[str, DetectorEntry], entries: Mapping[str, ZooEntry]
) -> dict[str, ZooEntry]:
    """The guarded models of the run that are in the zoo together with their classifier."""
    found = {}
    for name in (name for name, card in run.cards.items() if card.detector and name in detectors):
        with suppress(UserError):
            found[name] = guarded_entry(detectors[name], entries)
    return found


def _find_named(
    run: Run,
    named: Sequence[str],
    entries: dict[str, ZooEntry],
    detectors: Mapping[str, DetectorEntry],
    checkpoints: Path | None,
) -> dict[str, ZooEntry]:
    others = {name: one for name, one in detectors.items() if name not in entries}
    requested = ModelRequest(run.dataset, run.shape, len(run.class_names), checkpoints)
    found = {name: find_model(name, entries, requested=requested, detectors=others) for name in named}
    return {name: pinned(replace(entry, trusted=True)) for name, entry in found.items()}


def _foreign(card: ModelCard, entry: ZooEntry) -> str:
    """How the verifier's model of a name differs from the bundle's."""
    mine, its = entry.card, card
    if mine.weights.sha256 != its.weights.sha256:
        return f"measured on weights {its.weights.sha256[:12]}, {entry.folder} has {mine.weights.sha256[:12]}"
    if mine.detector != its.detector and mine.bare.function_hash == its.bare.function_hash:
        return f"the same classifier guarded by another detector than in {entry.guard and entry.guard.folder}"
    parts = ("architecture", "input_shape", "classes", "grey_levels", "preprocessing", "weights")
    names = [part for part in parts if getattr(mine, part) != getattr(its, part)]
    return f"the same weights in another function ({', '.join(names)}) than in {entry.folder}"


def _other_labels(card: ModelCard, own: ModelCard) -> str:
    """Differences between the bundle's and the verifier's card in what tables show of a model."""
    pairs = (("defense", card.defense, own.defense), ("data set", card.dataset, own.dataset))
    return "; ".join(f"{what} {its}, here it is {mine}" for what, its, mine in pairs if its != mine)


def _require_used(
    run: Run, own: dict[str, ZooEntry], models: dict[str, ZooEntry], missing: dict[str, str]
) -> None:
    flows = {
        reference.sha256
        for result in run.cells
        for reference in (result.cell.attack_flow, result.cell.nll_flow)
        if reference is not None
    }
    searched = {result.cell.attack.parameters.get("function") for result in run.cells}
    for name, entry in own.items():
        used = entry in models.values() or entry.card.name in missing or entry.card.weights.sha256 in flows
        used = used or entry.card.function_hash in searched
        if not used:
            listed = ", ".join(
                f"{card.name} (weights {card.weights.sha256[:12]})" for card in run.cards.values()
            )
            raise UserError(
                f"--model {name!r} (weights {entry.card.weights.sha256[:12]}) is none of the bundle's models: "
                f"{listed}; name one of those, or leave --model out"
            )
