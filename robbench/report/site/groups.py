"""Runs as a site shows them: those on the same samples of the same data under one seed share their tables."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from robbench.cards import ModelCard
from robbench.core.memory import Remembers
from robbench.report.facts import complete
from robbench.report.gallery import Originals
from robbench.report.site.page import slug, slugs
from robbench.results.rows import ModelResults, TableRow, models
from robbench.results.tables import leaderboard
from robbench.specs import ResolvedAttack
from robbench.store.ledger import Ledger
from robbench.store.merged import choose_cells, conflicts
from robbench.store.records import CellResult, Run

SWEEPS = "-sweeps"  # ending of the folder of a group's sweeps
Key = tuple[str, str, int, tuple[int, ...], tuple[int, int, int]]


@dataclass(frozen=True)
class Group(Remembers):
    """Runs whose numbers may stand in one table.

    Attributes:
        slug: its folder.
        title: as pages call it.
        run: union of the runs, which is what pages show.
        sources: the runs.
        sweep: further cells of the same models, on attacks of this group with another budget or number of steps. They
            have a group of their own, for a worst case or an average over them would say nothing.
        is_sweep: whether this is such a group.
    """

    slug: str
    title: str
    run: Run
    sources: tuple[Run, ...]
    sweep: Run | None = None
    is_sweep: bool = False

    @property
    def name(self) -> str:
        """Its title without seed and number of samples."""
        return self.title.replace(f", seed {self.run.seed}, n = {self.run.n}", "")

    def swept(self, model: str) -> list[CellResult]:
        """Cells of `sweep` on one model."""
        return self._swept.get(model, [])

    @cached_property
    def _swept(self) -> dict[str, list[CellResult]]:
        found: dict[str, list[CellResult]] = {}
        for result in self.sweep.cells if self.sweep else ():
            found.setdefault(result.cell.model_name, []).append(result)
        return found

    @cached_property
    def rows(self) -> list[TableRow]:
        """All numbers of the group, computed once."""
        return leaderboard(self.run)

    @cached_property
    def _strengths(self) -> dict[str, list[float]]:
        """Accuracies in percent under each attack on classifiers, a model each."""
        found: dict[str, list[float]] = {}
        for row in self.rows:
            if row.metric == "accuracy" and row.value is not None:
                found.setdefault(row.attack, []).append(row.value)
        return found

    def strength(self, label: str) -> tuple[float | None, int]:
        """(mean accuracy under an attack in percent, models that it is over)."""
        values = self._strengths.get(label, [])
        return (sum(values) / len(values) if values else None), len(values)

    @cached_property
    def by_strength(self) -> list[str]:
        """Labels of the attacks, that with the lowest mean accuracy first; those without one last, in plan order."""
        means = {label: self.strength(label)[0] for label in self.attack_labels}
        return sorted(means, key=lambda label: (means[label] is None, means[label] or 0.0))

    @cached_property
    def models(self) -> list[ModelResults]:
        return models(self.run)

    @cached_property
    def classifiers(self) -> dict[str, str]:
        """Names of the classifiers by the path of their page."""
        return {
            self.model_path(model.name): model.name for model in self.models if model.kind == "classifier"
        }

    @cached_property
    def places(self) -> list[dict[tuple[str, str], list[int]]]:
        """Of each source where in its cells those of a hash and label are."""
        found: list[dict[tuple[str, str], list[int]]] = []
        for run in self.sources:
            places: dict[tuple[str, str], list[int]] = {}
            for k, result in enumerate(run.cells):
                places.setdefault((result.cell.hash, result.cell.attack.label), []).append(k)
            found.append(places)
        return found

    @cached_property
    def attack_labels(self) -> list[str]:
        """Labels of the attacks, in plan order."""
        return list(dict.fromkeys(result.cell.attack.label for result in self.run.cells))

    @cached_property
    def _model_slugs(self) -> dict[str, str]:
        return slugs(model.name for model in self.models)

    @cached_property
    def _attack_slugs(self) -> dict[str, str]:
        return slugs(self.attack_labels)

    def card(self, model: str) -> ModelCard | None:
        """The card of a model, with what the shipped card of the same function says more."""
        return complete(self.run.cards.get(model))

    def model_path(self, name: str) -> str:
        """Path of a model's page."""
        return f"{self.slug}/model-{self._model_slugs[name]}.html"

    def attack_path(self, label: str) -> str:
        """Path of an attack's page."""
        return f"{self.slug}/attack-{self._attack_slugs[label]}.html"

    def threat_path(self, threat_model: str) -> str:
        """Path of a threat model's page."""
        return f"{self.slug}/threat-{slug(threat_model)}.html"

    def board_path(self, board: str = "") -> str:
        """Path of a leaderboard by its slug; without one, of that which its folder opens with."""
        return f"{self.slug}/board-{board}.html" if board else f"{self.slug}/index.html"

    @property
    def sweep_path(self) -> str:
        """Path of the leaderboard of its sweeps; empty without any."""
        return f"{self.slug}{SWEEPS}/index.html" if self.sweep else ""

    @property
    def compare_path(self) -> str:
        """Path of the page that compares two models."""
        return f"{self.slug}/compare.html"

    @cached_property
    def originals(self) -> Originals | None:
        """Clean images by sample id, of the samples that any source kept; None where none kept any."""
        stored = {
            i: image
            for run in reversed(self.sources)
            for i, image in Ledger(run.folder).originals().items()
            if image.shape == self.run.shape
        }
        return _lookup(stored) if stored else None


def _lookup(stored: dict[int, np.ndarray]) -> Callable[[Sequence[int]], np.ndarray]:
    return lambda ids: np.stack([stored[int(i)] for i in ids])


@dataclass(frozen=True)
class Site(Remembers):
    """Everything the pages are made from. runs: as given; groups: in order of their first run. published: where the
    published tables stand, None in pages of the site itself, otherwise the address of files beside it or "" for none.
    """

    runs: tuple[Run, ...]
    groups: tuple[Group, ...]
    published: str | None = None

    @cached_property
    def by_data(self) -> dict[str, list[Group]]:
        """The groups of each data set, that with most cells first; the data set with most cells first."""
        found: dict[str, list[Group]] = {}
        for group in sorted(self.groups, key=lambda group: -len(group.run.cells)):
            found.setdefault(group.run.dataset, []).append(group)
        return found


def site_of(runs: Sequence[Run]) -> Site:
    """Runs grouped: the same data, samples and seed, and nothing that one calls otherwise than another. A run given
    twice, or as a folder and as a bundle of it, counts once."""
    runs = _distinct(runs)
    collected: list[list[Run]] = []
    for run in runs:
        home = next((group for group in collected if _fits(group, run)), None)
        if home is None:
            collected.append([run])
        else:
            home.append(run)
    titles = _titles([group[0] for group in collected])
    names = _number_names(slug(_title(group[0])) for group in collected)
    groups: list[Group] = []
    for name, title, group in zip(names, titles, collected, strict=True):
        groups += _with_sweep(Group(name, title, _union(group), tuple(group)))
    return Site(tuple(runs), tuple(groups))


def _with_sweep(group: Group) -> list[Group]:
    """The group, and behind it that of its sweeps where there are some: cells with a calibrated budget, or one or steps
    given by hand, of attacks that the group has as they are defined (on any model: an attack that some models lack
    costs them their rank)."""
    defined = {r.cell.attack.label for r in group.run.cells}
    given = [r for r in group.run.cells if _base_of(r.cell.attack) in defined]
    if not given:
        return [group]
    taken = {id(result) for result in given}
    sweep = replace(group.run, cells=given)
    main = replace(group.run, cells=[r for r in group.run.cells if id(r) not in taken])
    title = f"{group.title}: other budgets and steps"
    return [
        replace(group, run=main, sweep=sweep),
        Group(f"{group.slug}{SWEEPS}", title, sweep, group.sources, is_sweep=True),
    ]


def _base_of(attack: ResolvedAttack) -> str:
    """Name of the attack as it is defined, where this is another budget or number of steps of it; else ""."""
    if attack.of_grid:
        return attack.name.rpartition("-")[0]
    return attack.name if attack.label.startswith(f"{attack.name}@") else ""


def _distinct(runs: Sequence[Run]) -> list[Run]:
    found: dict[object, Run] = {}
    for run in runs:
        cells = tuple((r.cell.hash, r.cell.attack.label, r.cell.status, len(r.rows)) for r in run.cells)
        found.setdefault((_key(run), tuple(run.versions.items()), run.note, cells), run)
    return list(found.values())


def _title(run: Run) -> str:
    return f"{run.dataset}, seed {run.seed}, n = {run.n}"


def _titles(runs: Sequence[Run]) -> list[str]:
    """A title of its own for each group, of the first run of each; of namesakes all but the largest run get a name."""
    plain = [_title(run) for run in runs]
    first = {
        title: max((r for r, t in zip(runs, plain, strict=True) if t == title), key=_size) for title in plain
    }
    named = [
        title if first[title] is run else f"{title} ({run.folder.name})"
        for title, run in zip(plain, runs, strict=True)
    ]
    counts = Counter(named)
    seen: Counter[str] = Counter()
    found = []
    for title in named:
        seen[title] += 1
        found.append(title if counts[title] == 1 else f"{title}, {seen[title]}")
    return found


def _size(run: Run) -> int:
    return len(run.cells)


def _number_names(names: Iterable[str]) -> list[str]:
    """Unique names: the second "digits" is "digits-2"."""
    counts: dict[str, int] = {}
    found = []
    for name in names:
        counts[name] = counts.get(name, 0) + 1
        found.append(name if counts[name] == 1 else f"{name}-{counts[name]}")
    return found


def _key(run: Run) -> Key:
    return run.dataset, run.dataset_revision, run.seed, tuple(sorted(run.sample_ids)), run.shape


def _fits(group: Sequence[Run], run: Run) -> bool:
    """Whether a run can stand in the tables of `group`."""
    if _key(group[0]) != _key(run) or group[0].versions != run.versions:
        return False
    return not conflicts([*group, run], accept_versions=True)


def _union(runs: Sequence[Run]) -> Run:
    """The runs of a group as one, every cell once."""
    notes = dict.fromkeys(run.note for run in runs if run.note)
    return replace(
        runs[0],
        cells=choose_cells(runs),
        cards={name: card for run in reversed(runs) for name, card in run.cards.items()},
        note=" ".join(notes),
        frechet_folders=tuple(run.folder for run in runs),
    )
