"""A page per threat model and a page per attack: what they are, and how strong they were on every model."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from robbench.metrics.accuracy import CORRUPTION_ACCURACY
from robbench.report.attack_lines import AttackLine, attack_lines, budget_text
from robbench.report.flow_page import FlowLine, flow_lines
from robbench.report.gallery import NO_ORIGINALS, Strip, Triple, places, sort_by_dispute, strips, triples
from robbench.report.site import definitions, formulas
from robbench.report.site.frame import body
from robbench.report.site.groups import Group, Site
from robbench.report.site.page import Page, Part
from robbench.report.site.provenance import provenance
from robbench.results import corruptions, wording
from robbench.results.perturbation import Distances
from robbench.results.rows import WORST_CASE, TableRow, adversaries, cell_status
from robbench.specs import ResolvedAttack
from robbench.store.records import CellResult

SHOWN_MODELS = 4  # models of whose images a page shows some
NO_IMAGES = "No images: the runs stored no adversarial examples of this attack."
NONE_BEFORE = Distances((), ())


def parts(site: Site) -> Iterator[Part]:
    """The pages of all attacks and threat models of all groups."""
    for group in site.groups:
        found = _Results(group)
        for label in group.attack_labels:
            yield _attack_page(group, found, label)
        for threat in found.by_threat:
            yield _threat_page(group, found, threat)


class _Results:
    """The cells and numbers of a group, looked up by attack, threat model and model."""

    def __init__(self, group: Group) -> None:
        self.group = group

    @cached_property
    def by_label(self) -> dict[str, list[CellResult]]:
        found: dict[str, list[CellResult]] = {}
        for result in self.group.run.cells:
            found.setdefault(result.cell.attack.label, []).append(result)
        return found

    @cached_property
    def by_threat(self) -> dict[str, list[CellResult]]:
        found: dict[str, list[CellResult]] = {}
        for result in self.group.run.cells:
            found.setdefault(result.cell.attack.threat_model, []).append(result)
        return found

    @cached_property
    def rows_of(self) -> dict[str, list[TableRow]]:
        found: dict[str, list[TableRow]] = {}
        for row in self.group.rows:
            found.setdefault(row.model, []).append(row)
        return found

    @cached_property
    def lines(self) -> dict[tuple[str, str], AttackLine]:
        """By model and label, of classifiers."""
        found = {}
        for model in self.group.models:
            if model.kind == "classifier":
                lines, _ = attack_lines(self.group.run, model.cells, self.rows_of[model.name], NONE_BEFORE)
                found.update({(model.name, line.attack.label): line for line in lines})
        return found

    def worst(self, model: str, attack: ResolvedAttack) -> TableRow | None:
        """The worst case of a model under the threat model and budget of `attack`."""
        if attack.space == corruptions.SPACE:  # they have a mean instead
            return next(
                (
                    r
                    for r in self.rows_of.get(model, [])
                    if r.metric == CORRUPTION_ACCURACY.name and r.threat_model == attack.threat_model
                ),
                None,
            )
        rows = [row for row in self.rows_of.get(model, []) if row.attack == WORST_CASE]
        return next((r for r in rows if (r.threat_model, r.epsilon, r.eta) == attack.threat), None)

    def clean(self, model: str) -> TableRow | None:
        return next((r for r in self.rows_of.get(model, []) if r.attack == "clean"), None)


@dataclass(frozen=True)
class Strength:
    """An attack on one classifier.

    Attributes:
        model: its name.
        path: of its page.
        defense: its training method.
        clean: row of its accuracy before attacks.
        line: the attack.
        share: broken samples in percent of those right before; None where unknown.
    """

    model: str
    path: str
    defense: str
    clean: TableRow | None
    line: AttackLine
    share: float | None


def _attack_page(group: Group, found: _Results, label: str) -> Page:
    results = found.by_label[label]
    attack = results[0].cell.attack
    sets, letters = formulas.admissible(attack.space, attack.norm, attack.pixel_range)
    goal, how = formulas.objective(attack)
    measure, what = formulas.measure(attack.target, attack.measure)
    shown, strip, reason = _images(group, results)
    content = body(
        "attack.html.j2",
        group=group,
        attack=attack,
        measure=f"{attack.measure[0].upper()}{attack.measure[1:]}",
        meaning=wording.MEANINGS[attack.measure],
        definition=definitions.of_attack(attack),
        budget=_budget(attack),
        parameters=_parameters(attack),
        formulas=[sets, *goal, measure],
        words=[letters, how, what],
        strengths=_strengths(found, results) if attack.target != "flow" else [],
        flows=_flow_lines(group, results) if attack.target == "flow" else [],
        triples=shown,
        strips=strip,
        no_images=reason,
        suspicions=_suspicions(results),
        failed=_list_failed(group, results),
    )
    crumbs = (
        (group.title, group.board_path()),
        (attack.threat_model, group.threat_path(attack.threat_model)),
    )
    return Page(
        group.attack_path(label), f"Attack {label}", "attack", content, crumbs, provenance(group, results)
    )


def _budget(attack: ResolvedAttack) -> str:
    unit = " of 255" if attack.pixel_range == 255 else ""
    return budget_text(attack) + (unit if attack.epsilon is not None else "")


def _parameters(attack: ResolvedAttack) -> list[tuple[str, str]]:
    return [(name, _plain(value)) for name, value in attack.parameters.items()]


def _plain(value: object) -> str:
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _strengths(found: _Results, results: Sequence[CellResult]) -> list[Strength]:
    """The models on which the attack was strongest first, those without a number last."""
    lines = [_strength(found, result) for result in results]
    return sorted(lines, key=lambda line: (line.share is None, -(line.share or 0.0)))


def _strength(found: _Results, result: CellResult) -> Strength:
    name = result.cell.model_name
    line = found.lines[name, result.cell.attack.label]
    known = line.accuracy.status == "ok" and line.attacked > 0
    return Strength(
        model=name,
        path=found.group.model_path(name),
        defense=result.cell.defense,
        clean=found.clean(name),
        line=line,
        share=100 * line.broken / line.attacked if known else None,
    )


def _flow_lines(group: Group, results: Sequence[CellResult]) -> list[tuple[str, str, str, FlowLine]]:
    """(model, path, defense, numbers) of every flow."""
    return [
        (r.cell.model_name, group.model_path(r.cell.model_name), r.cell.defense, line)
        for r, line in zip(results, flow_lines(group.run, results), strict=True)
    ]


def _images(
    group: Group, results: Sequence[CellResult]
) -> tuple[list[tuple[str, str, Triple]], list[tuple[str, Strip]], str]:
    """(model, path, triple) of some classifiers, or (model, strip) of flows; else why there are none."""
    stored = [r for r in results if len(r.rows) and r.rows["example"].notna().any()]
    if results[0].cell.attack.target == "flow":
        lines = [(r.cell.model_name, s) for r in _pick_evenly(stored) for s in strips(group.run, [r])]
        return [], lines, "" if lines else NO_IMAGES
    if group.originals is None:
        return [], [], NO_ORIGINALS
    turn = group.attack_labels.index(results[0].cell.attack.label)
    order = places(sort_by_dispute(stored), turn)
    shown = [
        (r.cell.model_name, group.model_path(r.cell.model_name), triple)
        for r in _pick_evenly(stored)
        for triple in triples(group.run, [r], group.originals, limit=1, order=order)
    ]
    return shown, [], "" if shown else NO_IMAGES


def _pick_evenly(results: Sequence[CellResult]) -> list[CellResult]:
    """Up to SHOWN_MODELS of `results`, from the first to the last."""
    count = min(len(results), SHOWN_MODELS)
    return [results[k * (len(results) - 1) // max(count - 1, 1)] for k in range(count)]


def _suspicions(results: Sequence[CellResult]) -> list[tuple[str, str]]:
    """(model, text)."""
    return [(r.cell.model_name, text) for r in results for text in r.cell.doubts]


def _list_failed(group: Group, results: Sequence[CellResult]) -> list[tuple[str, str, str]]:
    """(model, status, reason) of the cells without a number."""
    found = [(r.cell.model_name, *cell_status(group.run, r)) for r in results]
    return [(name, status, reason) for name, status, reason in found if status != "ok"]


@dataclass(frozen=True)
class AttackSummary:
    """One attack under a threat model, over the models it was run on.

    Attributes:
        label: of the attack.
        path: of its page.
        description: what it is.
        mean: accuracy in percent, mean over models with a number.
        strongest: models on which no other attack of the page left a lower accuracy.
        models: those with a number.
        planned: those it was to be run on.
    """

    label: str
    path: str
    description: str
    mean: float | None
    strongest: int
    models: int
    planned: int


@dataclass(frozen=True)
class ThreatLine:
    """One classifier under a threat model and budget.

    Attributes:
        model: its name.
        path: of its page.
        defense: its training method.
        clean: row of its accuracy before attacks.
        worst: row of the worst case over the attacks.
        strongest: (label, path) of the attacks that left the lowest accuracy alone, several where they left the same.
        alone: row of that accuracy.
        attacks: how many were run.
    """

    model: str
    path: str
    defense: str
    clean: TableRow | None
    worst: TableRow | None
    strongest: tuple[tuple[str, str], ...]
    alone: TableRow | None
    attacks: int


@dataclass(frozen=True)
class BudgetPart:
    """One budget of a threat model. title: "ε = 0.2"."""

    title: str
    attacks: tuple[AttackSummary, ...]
    lines: tuple[ThreatLine, ...]


def _threat_page(group: Group, found: _Results, threat: str) -> Page:
    results = found.by_threat[threat]
    attack = results[0].cell.attack
    sets, letters = formulas.admissible(attack.space, attack.norm, attack.pixel_range)
    strict = adversaries(results)
    shown_of = (strict or results)[0].cell.attack
    measure, what = formulas.measure(attack.target, shown_of.measure, several=bool(strict))
    by_budget: dict[str, list[CellResult]] = {}
    for result in results:
        by_budget.setdefault(_budget(result.cell.attack), []).append(result)
    shown, strip, reason = _images(group, _one_each(results))
    content = body(
        "threat.html.j2",
        group=group,
        attack=attack,
        norm=attack.norm if len({r.cell.attack.norm for r in results}) == 1 else "of each attack",
        measures=wording.measures(
            row for row in group.rows if row.attack in found.by_label and row.threat_model == threat
        ),
        together="worst case" if strict else "mean" if attack.space == corruptions.SPACE else "",
        definition=definitions.of_threat_model(attack),
        formulas=[sets, measure],
        words=[letters, what],
        budgets=[_budget_part(found, title, cells) for title, cells in by_budget.items()],
        triples=shown,
        strips=strip,
        no_images=reason,
        failed=_list_failed(group, results),
    )
    crumbs = ((group.title, group.board_path()),)
    return Page(
        group.threat_path(threat),
        f"Threat model {threat}",
        "threat",
        content,
        crumbs,
        provenance(group, results),
    )


def _one_each(results: Sequence[CellResult]) -> list[CellResult]:
    """One cell a model, of another attack each time."""
    labels = list(dict.fromkeys(r.cell.attack.label for r in results))
    by_model: dict[str, list[CellResult]] = {}
    for result in results:
        by_model.setdefault(result.cell.model_name, []).append(result)
    return [
        cells[(k * len(labels) // max(len(by_model), 1)) % len(cells)]
        for k, cells in enumerate(by_model.values())
    ]


def _budget_part(found: _Results, title: str, results: Sequence[CellResult]) -> BudgetPart:
    by_model: dict[str, list[CellResult]] = {}
    for result in results:
        by_model.setdefault(result.cell.model_name, []).append(result)
    lines = [_threat_line(found, cells) for cells in by_model.values() if cells[0].cell.decides]
    lowest = [label for line in lines for label, _ in line.strongest]
    mine = {r.cell.attack.label for r in results}
    labels = [label for label in found.group.by_strength if label in mine]
    return BudgetPart(title, tuple(_summary(found, label, results, lowest) for label in labels), tuple(lines))


def _threat_line(found: _Results, cells: Sequence[CellResult]) -> ThreatLine:
    first = cells[0].cell
    numbers = [found.lines[first.model_name, r.cell.attack.label] for r in cells]
    strict = [line for line in numbers if line.attack.is_adversary]
    done = [line for line in strict or numbers if line.accuracy.value is not None]
    alone = min((line.accuracy for line in done), key=lambda row: row.value or 0.0, default=None)
    labels = [line.attack.label for line in done if alone and line.accuracy.value == alone.value]
    return ThreatLine(
        model=first.model_name,
        path=found.group.model_path(first.model_name),
        defense=first.defense,
        clean=found.clean(first.model_name),
        worst=found.worst(first.model_name, first.attack),
        strongest=tuple((label, found.group.attack_path(label)) for label in labels),
        alone=alone,
        attacks=len(cells),
    )


def _summary(
    found: _Results, label: str, results: Sequence[CellResult], lowest: Sequence[str]
) -> AttackSummary:
    mine = [r for r in results if r.cell.attack.label == label]
    mean, models = found.group.strength(label)
    is_flow = mine[0].cell.attack.target == "flow"
    return AttackSummary(
        label=label,
        path=found.group.attack_path(label),
        description=definitions.of_attack(mine[0].cell.attack).description,
        mean=mean,
        strongest=lowest.count(label),
        models=sum(cell_status(found.group.run, r)[0] == "ok" for r in mine) if is_flow else models,
        planned=len(mine),
    )
