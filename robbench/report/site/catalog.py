"""The attacks and threat models of all groups on one page, by data set, the strongest first."""

from collections.abc import Iterator
from dataclasses import dataclass

from robbench.report.attack_lines import budget_text
from robbench.report.site.frame import CATALOG, body
from robbench.report.site.groups import Group, Site
from robbench.report.site.page import Page, Part


@dataclass(frozen=True)
class AttackEntry:
    """An attack in a group.

    Attributes:
        group: where it was run.
        label: of the attack.
        threat_model: its name.
        budget: in words.
        mean: accuracy under it in percent, mean over the models with a number; None without.
        models: how many these are.
    """

    group: Group
    label: str
    threat_model: str
    budget: str
    mean: float | None
    models: int


def parts(site: Site) -> Iterator[Part]:
    """The page."""
    entries = [entry for groups in site.by_data.values() for group in groups for entry in _entries(group)]
    threats: dict[str, dict[str, Group]] = {}
    for entry in entries:
        threats.setdefault(entry.threat_model, {})[entry.group.slug] = entry.group
    content = body("catalog.html.j2", entries=entries, threats=threats)
    yield Page(CATALOG, "Attacks and threat models", "catalog", content)


def _entries(group: Group) -> list[AttackEntry]:
    cells = {result.cell.attack.label: result.cell.attack for result in group.run.cells}
    return [
        AttackEntry(
            group, label, cells[label].threat_model, budget_text(cells[label]), *group.strength(label)
        )
        for label in group.by_strength
    ]
