"""Checks of the identity of a bundle's cells: their addresses, and the settings of their attacks."""

import re
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

from robbench.attacks import ATTACKS
from robbench.bundle.findings import WHOLE, Finding, judge
from robbench.cards import FlowReference, ModelCard
from robbench.core.errors import UserError
from robbench.core.schema import load_yaml, validate
from robbench.data import Dataset
from robbench.specs import (
    TRANSFER,
    ResolvedAttack,
    Semantics,
    ThreatModel,
    from_surrogate,
    importance_weighted,
    resolve_attack,
)
from robbench.store.merged import conflicts
from robbench.store.records import CellRecord, Run, cell_hash

ADDRESS, SETTINGS = "address", "settings"
_FILES = ("sha256",)  # parameters that identify a file that was read, not a setting


def address_findings(run: Run, flows: Mapping[str, ModelCard]) -> Iterator[Finding]:
    """One finding per cell: whether its address follows from its card, attack, flows, engine, data and seed.

    flows: the verifier's cards, by sha256 of the weights.
    """
    for cell in (result.cell for result in run.cells):
        absent = [ref.name for ref in _references(cell) if ref.sha256 not in flows]
        if absent:
            reason = (
                f"flow {absent[0]} is not at hand, and the address depends on it; name it with --model CARD"
            )
            yield Finding(cell.model, cell.attack.label, ADDRESS, "unchecked", 0, reason)
            continue
        found = _address(run.cards[cell.model], cell, flows)
        wrong = [
            "it does not follow from settings, model and flow: something was edited, or their cards were"
        ]
        yield judge(cell.model, cell.attack.label, ADDRESS, 1, wrong if found != cell.hash else [])


def _references(cell: CellRecord) -> list[FlowReference]:
    return [reference for reference in (cell.attack_flow, cell.nll_flow) if reference is not None]


def _address(card: ModelCard, cell: CellRecord, flows: Mapping[str, ModelCard]) -> str:
    attack_flow, nll_flow = (
        None if reference is None else flows[reference.sha256]
        for reference in (cell.attack_flow, cell.nll_flow)
    )
    return cell_hash(
        card,
        cell.attack,
        attack_flow,
        nll_flow,
        cell.engine,
        cell.batch_size,
        cell.dataset,
        cell.dataset_revision,
        cell.seed,
        cell.precision,
        cell.search_precision,
    )


def settings_findings(
    run: Run, known: Mapping[str, ThreatModel], dataset: Dataset | None = None
) -> Iterator[Finding]:
    """One finding per attack and setting: whether it is what the installed threat models define under its name.

    A "pgd20" with one step has a valid address and consistent rows; only its name is false. dataset: the verifier's,
    which decides whose budgets apply, where available.
    """
    like = dataset.like if dataset is not None else run.data.like if run.data is not None else None
    datasets = [name for name in (run.dataset, like) if name]
    if problems := conflicts([run], ["the bundle"]):  # one label with two settings, one name with two results
        yield judge(WHOLE, "", SETTINGS, len(run.cells), problems)
    attacks = {r.cell.attack.model_dump_json(): r.cell.attack for r in run.cells}
    for attack in attacks.values():
        yield _setting_finding(attack.label, attack, datasets, known)


def _setting_finding(
    label: str, attack: ResolvedAttack, datasets: list[str], known: Mapping[str, ThreatModel]
) -> Finding:
    if not any(attack.name in model.attacks for model in known.values()):
        reason = "no threat model here defines it; name the folder of its YAML with --threat-models"
        return Finding(WHOLE, label, SETTINGS, "unchecked", 0, reason)
    problems = _problems(label, attack, datasets, known)
    if not problems and attack.semantics != _semantics(attack):
        reason = (
            f"measured as a {attack.semantics}, before robbench declared it a {_semantics(attack)}: images that are "
            f"misclassified without attack were left as they are"
        )
        return Finding(WHOLE, label, SETTINGS, "weaker", 1, reason)
    return judge(WHOLE, label, SETTINGS, 1, problems)


def bundled_findings(folder: Path, run: Run) -> Iterator[Finding]:
    """One finding per attack whose settings differ from the threat models in the bundle, which readers take for what
    was measured. folder: the unpacked bundle."""
    models = (load_yaml(path, ThreatModel) for path in sorted((folder / "threat_models").glob("*.yaml")))
    bundled = {model.name: model for model in models}
    datasets = [name for name in (run.dataset, run.data.like if run.data is not None else None) if name]
    attacks = {r.cell.attack.model_dump_json(): r.cell.attack for r in run.cells}
    for attack in attacks.values():
        if any(attack.name in model.attacks for model in bundled.values()):
            problems = _problems(attack.label, attack, datasets, bundled)
            if problems:
                texts = [f"not as in the bundle's own threat_models: {text}" for text in problems]
                yield judge(WHOLE, attack.label, SETTINGS, 1, texts)


def _problems(
    label: str, attack: ResolvedAttack, datasets: list[str], known: Mapping[str, ThreatModel]
) -> list[str]:
    """Differences between an attack and what the threat models define under its label; empty where there are none."""
    base, changes = _parts(label)
    candidates = list(_candidates(attack, datasets, known))
    named = [candidate for candidate in candidates if candidate.label == base]
    if not named:
        near = min(candidates, key=lambda c: len(_differences(c, attack, "")), default=attack)
        return [f"attack {attack.name!r} with these settings is called {near.label}, not {label}"]
    return min((_differences(c, attack, changes) for c in named), key=len)


def _semantics(attack: ResolvedAttack) -> Semantics:
    """The semantics that the algorithm declares for the parameters; the recorded ones where these are invalid."""
    found = ATTACKS.get(attack.algorithm)
    try:
        parameters = validate(attack.parameters, found.Parameters, f"attack {attack.name!r}")
    except UserError:
        return attack.semantics
    return found.declared_semantics(parameters)


def _parts(label: str) -> tuple[str, str]:
    """A label without the changes that an experiment appends to it, and these changes: ("jsa50", "levels=[1]")."""
    base, _, changes = label.rpartition("@")
    return (base, changes) if base and "=" in changes else (label, "")


def _candidates(
    attack: ResolvedAttack, datasets: list[str], known: Mapping[str, ThreatModel]
) -> Iterator[ResolvedAttack]:
    """The defined attack of that name, with and without the budgets, steps and noise draws of the bundle."""
    searched, target = attack.on_surrogate.parameters, attack.parameters.get("target")
    steps = searched.get("steps")
    steps = steps if isinstance(steps, int) else None
    choices = product(datasets, (None, attack.epsilon), (None, attack.eta), (None, steps))
    for dataset, epsilon, eta, count in dict.fromkeys(choices):
        try:
            found = resolve_attack(attack.name, dataset, dict(known), epsilon, eta, count, target)
        except UserError:  # no budget for this data set, or one on the wrong scale: no candidate
            continue
        if attack.algorithm == TRANSFER:
            surrogate = (str(attack.parameters.get(key, "")) for key in ("surrogate", "sha256", "function"))
            found = from_surrogate(found, *surrogate)
        yield found
        if attack.parameters.get("estimate") == "importance":
            yield importance_weighted(found, int(attack.parameters.get("noise_draws", 1)))


def _differences(defined: ResolvedAttack, attack: ResolvedAttack, stated: str) -> list[str]:
    """Settings in which the bundle's attack differs from the defined one (with the algorithm's defaults), except those
    `stated` in its label. Parameters that the bundle lacks are newer than it."""
    left_out = {"label", "parameters", "semantics"}  # the last follows from the parameters
    mine, its = (spec.model_dump(mode="json", exclude=left_out) for spec in (defined, attack))
    pairs = [(key, mine[key], its[key]) for key in mine]
    here = _parameters(defined)
    said = _parse_changes(stated)
    pairs += [
        (f"parameters.{key}", said.get(key, here.get(key)), value)
        for key, value in attack.parameters.items()
        if key not in _FILES and not (key in said and _is_called(value, said[key]))
    ]
    pairs += [(f"parameters.{key}", text, None) for key, text in said.items() if key not in attack.parameters]
    return [f"{key} is {other}, here it is {own}" for key, own, other in pairs if own != other]


def _parse_changes(changes: str) -> dict[str, str]:
    """ "levels=[1, 2],steps=5" as a dictionary; a key that occurs twice gets a value that matches nothing."""
    found: dict[str, str] = {}
    for part in re.split(r",(?=\w+=)", changes) if changes else []:
        key, _, text = part.partition("=")
        found[key] = f"{found[key]} and {text}" if key in found else text
    return found


def _is_called(value: object, text: str) -> bool:
    """Whether `text` in a label stands for `value`; 1 and 1.0 are the same number."""
    try:
        return str(value) == text or (isinstance(value, float) and value == float(text))
    except ValueError:
        return False


def _parameters(attack: ResolvedAttack) -> dict[str, Any]:
    schema = ATTACKS.get(attack.algorithm).Parameters
    filled: dict[str, Any] = validate(attack.parameters, schema, f"attack {attack.name!r}").model_dump(
        mode="json"
    )
    return filled
