"""Two models on the same samples: who is robust where the other is not, and whether that can be chance."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations, pairwise
from urllib.parse import urlencode

from markupsafe import Markup

from robbench.report.site.boards import threat_title
from robbench.report.site.frame import body
from robbench.report.site.groups import Group, Site
from robbench.report.site.page import Page, Part
from robbench.report.site.provenance import provenance
from robbench.results.pairs import PackedModel, pack_run, unpack
from robbench.results.tables import ALL_THREATS
from robbench.results.threats import group_by_threat, name_threat
from robbench.specs import ResolvedAttack
from robbench.statistics import accuracy
from robbench.statistics.accuracy import Verdicts
from robbench.statistics.paired import PairedCounts, paired
from robbench.store.records import CellResult

ROOM = 1_700_000  # characters of packed verdicts that a page may hold
CLOSEST = 20
ALL_PAIRS = 150  # models; beyond it only neighbours in the order of worst cases are looked at
WORST = "worst case"
CLEAN = "clean"


def parts(site: Site) -> Iterator[Part]:
    """One page per group with two classifiers or more to compare."""
    for group in site.groups:
        found = _Comparison(group, _siblings(site, group))
        if len(found.models) > 1:
            yield _page(found)


def link(group: Group, path: str) -> Markup:
    """A way from the page of a model at `path` to the comparison; empty where there is none."""
    name = group.classifiers.get(path)
    if name is None or len(group.classifiers) < 2:
        return Markup("")
    state, text = urlencode({"a": name}), f"Compare {name} with another model"
    return Markup('<p class="more"><a href="site:{}?{}">{}</a></p>').format(group.compare_path, state, text)


def _siblings(site: Site, group: Group) -> list[Group]:
    """The group, and others on the same samples: another version of robbench, or other weights of one name."""
    mine = group.run
    others = [
        other
        for other in site.groups
        if other is not group
        and other.is_sweep == group.is_sweep
        and (other.run.dataset, other.run.dataset_revision) == (mine.dataset, mine.dataset_revision)
        and sorted(other.run.sample_ids) == sorted(mine.sample_ids)
    ]
    return [group, *others]


@dataclass(frozen=True)
class Entry:
    """A model to choose. name: with its group where another has it too; verdicts: packed, by column."""

    name: str
    verdicts: dict[str, str]


@dataclass(frozen=True)
class Pair:
    """Two models in the leading column `on`."""

    first: str
    second: str
    on: str
    counts: PairedCounts

    @property
    def state(self) -> str:
        """Query string of an address that opens the page with this pair."""
        return urlencode({"a": self.first, "b": self.second, "on": self.on})


class _Comparison:
    """Everything the page of a group needs. groups: itself, then its siblings."""

    def __init__(self, group: Group, groups: Sequence[Group]) -> None:
        self.group, self.groups = group, groups

    @cached_property
    def attacks(self) -> dict[str, ResolvedAttack]:
        found: dict[str, ResolvedAttack] = {}
        for group in self.groups:
            for result in group.run.cells:
                if result.cell.decides:
                    found.setdefault(result.cell.attack.label, result.cell.attack)
        return found

    @cached_property
    def columns(self) -> list[str]:
        """What two models may be compared on: worst cases, clean, then single attacks as far as there is room."""
        return self._all_columns[: self._fitting]

    @cached_property
    def _all_columns(self) -> list[str]:
        threats = dict.fromkeys(
            threat_title(attack) for attack in self.attacks.values() if attack.is_adversary
        )
        several = [f"worst {title}" for title in threats] if len(threats) > 1 else []
        # Over the budgets and steps of a sweep a worst case says nothing.
        return [*([] if self.group.is_sweep else [WORST]), *several, CLEAN, *self.attacks]

    @cached_property
    def _fitting(self) -> int:
        one = len(self.models) * (4 * ((self.group.run.n + 23) // 24) + 3)
        return max(1, min(len(self._all_columns), ROOM // max(one, 1)))

    @property
    def dropped(self) -> int:
        """Columns that found no room."""
        return len(self._all_columns) - len(self.columns)

    @cached_property
    def models(self) -> list[Entry]:
        taken: set[str] = set()
        found: list[Entry] = []
        for group in self.groups:
            run = replace(group.run, sample_ids=self.group.run.sample_ids)
            cells = {model.name: model.cells for model in group.models}
            for name, model in pack_run(run).items():
                shown = name if name not in taken else f"{name}, {group.title}"
                taken.add(shown)
                found.append(Entry(shown, self._verdicts(cells[name], model)))
        return found

    def _verdicts(self, results: Sequence[CellResult], model: PackedModel) -> dict[str, str]:
        cells = {r.cell.attack.label: r.cell.attack for r in results}
        threats = group_by_threat(cells.values(), lambda attack: attack)
        titles = {name_threat(threat): threat_title(attacks[0]) for threat, attacks in threats.items()}
        same = {label for label, attack in cells.items() if attack == self.attacks.get(label)}
        worst = {WORST: model.worst.get(ALL_THREATS)}
        worst |= {f"worst {titles[key]}": text for key, text in model.worst.items() if key in titles}
        found = {CLEAN: model.clean} | {
            key: text for key, text in worst.items() if self._combined[key] <= same
        }
        found |= {label: text for label, text in model.attacks.items() if label in same}
        return {key: text for key, text in found.items() if text is not None}

    @cached_property
    def _combined(self) -> dict[str, set[str]]:
        """The attacks that each worst case is over; a model that lacks one of them has no such number, for over fewer
        attacks a worst case looks better."""
        found: dict[str, set[str]] = {WORST: set()}
        for label, attack in self.attacks.items():
            if attack.is_adversary:
                found[WORST].add(label)
                if attack.threat is not None:
                    found.setdefault(f"worst {threat_title(attack)}", set()).add(label)
        return found

    @cached_property
    def leading(self) -> str:
        """The column that the page begins with: the first under which any model is ever right."""
        return next(
            (key for key in self.columns if any(v.any() for v in self._verdicts_under(key).values())),
            self.columns[0],
        )

    def _verdicts_under(self, key: str) -> dict[str, Verdicts]:
        n = self.group.run.n
        return {m.name: unpack(m.verdicts[key], n) for m in self.models if key in m.verdicts}

    @cached_property
    def _held(self) -> dict[str, Verdicts]:
        """Verdicts in the leading column of the models that have some, the best first."""
        found = self._verdicts_under(self.leading)
        return dict(sorted(found.items(), key=lambda item: -int(item[1].sum())))

    @property
    def closest(self) -> list[Pair]:
        """The pairs that are most alike in the leading column, the most alike first."""
        held = self._held
        pairs = combinations(held, 2) if len(held) <= ALL_PAIRS else pairwise(held)
        nearest = sorted(pairs, key=lambda pair: int(held[pair[0]].sum()) - int(held[pair[1]].sum()))
        return [Pair(a, b, self.leading, paired(held[a], held[b])) for a, b in nearest[:CLOSEST]]

    @property
    def data(self) -> Markup:
        """What the script needs, as JSON that cannot end its element."""
        columns = self.columns
        content = {
            "n": self.group.run.n,
            "ids": list(self.group.run.sample_ids),
            "columns": columns,
            "first": [*list(self._held)[:2], self.leading],
            "models": [[m.name, [m.verdicts.get(key) for key in columns]] for m in self.models],
        }
        return Markup(json.dumps(content, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c"))


def _page(found: _Comparison) -> Page:
    group = found.group
    content = body(
        "compare.html.j2",
        group=group,
        data=found.data,
        models=len(found.models),
        dropped=found.dropped,
        leading=found.leading,
        several=len(found.groups) > 1,
        pairs=[(pair, pair.counts.difference(accuracy.CONFIDENCE)) for pair in found.closest],
    )
    cells = [r for r in group.run.cells if r.cell.decides]
    return Page(
        group.compare_path,
        "Compare two models",
        "compare",
        content,
        ((group.title, group.board_path()),),
        provenance(group, cells),
    )
