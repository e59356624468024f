"""A page per model: what it is, what it withstands, what breaks it and how, and where the numbers come from."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from markupsafe import Markup

from robbench.core.counting import count_noun
from robbench.metrics.accuracy import NEAR_TIE, ROBUST_ACCURACY
from robbench.report.attack_lines import AttackLine, attack_lines, budget_words, nll_flows
from robbench.report.flow_page import NO_SHOTS, flow_section, nll_parts
from robbench.report.gallery import NO_EXAMPLES, NO_ORIGINALS, Triple, places, sort_by_dispute
from robbench.report.site.boards import boards, threat_title
from robbench.report.site.frame import body
from robbench.report.site.groups import Group, Site
from robbench.report.site.model_classes import LARGEST_MATRIX, Confusion, class_names, class_table, confusions
from robbench.report.site.model_curves import sweeps
from robbench.report.site.model_detection import detection_section
from robbench.report.site.model_figures import FIGURED, model_figures
from robbench.report.site.model_gallery import Levels, examples, levels
from robbench.report.site.model_joint import Joint, ensembles, joint
from robbench.report.site.page import Page, Part
from robbench.report.site.provenance import provenance
from robbench.report.site.ranks import EXPLANATION
from robbench.report.site.tables import RANK, Board
from robbench.results import corruptions, wording
from robbench.results.likelihood import caption
from robbench.results.parity import parity_note
from robbench.results.perturbation import NOT_SCORED, Distances, distances
from robbench.results.rows import (
    AVERAGE,
    CLEAN,
    WORST_CASE,
    ModelResults,
    TableRow,
    adversaries,
    cell_status,
    complete,
)
from robbench.results.tables import ALL_THREATS
from robbench.specs import Threat
from robbench.store.records import CellResult, Run

PLAIN = (
    "Left out here: {models:,} models are in these tables, and figures and images stand on the pages of up to "
    f"{FIGURED:,}. A site of this model's run alone has them."
)

# What `attacks.suspicions` looks for; the sentences of what it found carry their numbers.
CHECKS = (
    "outputs that are probabilities instead of logits, or have bounds as squashed ones do",
    "input gradients that are exactly zero or not finite, at clean images and on the way of a search",
    "samples that APGD-T broke and APGD-CE left to it (in ensembles that begin with both)",
    "a cross-entropy that an attack which climbs it did not raise",
    "samples that Square broke and no gradient attack before it (in ensembles that end in Square)",
    "batches that were halved for want of memory",
)


@dataclass(frozen=True)
class AccuracyLine:
    """A line of the accuracy table.

    Attributes:
        title: what was measured.
        about: which implementation of it.
        path: of the attack's page, empty without one.
        row: of the leaderboard.
        attack: None for what combines attacks.
        missing: why there is no number.
    """

    title: str
    about: str
    path: str
    row: TableRow
    attack: AttackLine | None = None
    missing: str = ""


@dataclass(frozen=True)
class Together:
    """What attacks broke together: all of them, or those of one threat model and budget."""

    title: str
    counts: Joint


@dataclass(frozen=True)
class Sign:
    """A sign of masked gradients, in words with its numbers, and the attacks that showed it."""

    text: str
    attacks: tuple[str, ...]


def parts(site: Site) -> Iterator[Part]:
    """The pages of all models, group by group."""
    for group in site.groups:
        pages = Pages(group)
        for model in group.models:
            yield pages.classifier(model) if model.kind == "classifier" else pages.flow(model)


class Pages:
    """The pages of one group, and what is computed once for all of them."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self._scored: Distances = distances(group.run)
        self._rows: dict[str, list[TableRow]] = {}
        for row in group.rows:
            self._rows.setdefault(row.model, []).append(row)
        self._board = boards(group)[0]
        self._ranks = _ranks(self._board)
        many = len(group.models) > FIGURED
        self._plain = PLAIN.format(models=len(group.models)) if many else ""  # why pages have no figures

    @cached_property
    def _disputed(self) -> list[int]:
        return sort_by_dispute(self._group.run.cells)

    def classifier(self, model: ModelResults) -> Page:
        """The page of a classifier."""
        return self._page(model, body("model_classifier.html.j2", **self._classifier_values(model)))

    def _classifier_values(self, model: ModelResults) -> dict[str, object]:
        run, rows = self._group.run, self._rows.get(model.name, [])
        lines, footnotes = attack_lines(run, model.cells, rows, self._scored)
        is_scored = bool(self._scored.records)
        return {
            **self._common(model),
            "accuracies": accuracy_lines(self._group, rows, lines, model.cells),
            "detection": detection_section(run, model, rows, bool(self._plain)),
            "headline": _headline(rows),
            "partial_note": wording.partial_note,
            "rank": self._ranks.get(model.name, ""),
            "rank_words": EXPLANATION,
            "board": self._board,
            "models": len(self._ranks),
            "intervals": " ".join(filter(None, [wording.measures(rows), wording.INTERVALS])),
            "near_tie": NEAR_TIE,
            **self._count(corruptions.without_corruptions(model)),
            "notes": notes(rows),
            "signs": signs(model.cells),
            "checks": CHECKS,
            **self._images(model),
            "section": _Details(
                model.name,
                lines,
                nll_flows(model.cells),
                self._scored.columns if is_scored else (),
                footnotes if is_scored else (f"Fréchet distances: {NOT_SCORED}.",),
            ),
            "corruptions": corruptions.corruption_tables(replace(run, cells=list(model.cells))),
            "corruption_header": corruptions.HEADER,
            "corruption_caption": corruptions.CAPTION,
        }

    def _count(self, model: ModelResults) -> dict[str, object]:
        """Curves, classes and what was broken together. model: without cells on corrupted images."""
        run, searched = self._group.run, model.cells
        done = complete(run, searched)
        names = class_names(run, done)
        confused = confusions(run, searched, len(names))
        return {
            "sweeps": [] if self._plain else sweeps(run, [*searched, *self._group.swept(model.name)]),
            "plain": self._plain,
            "figures": [] if self._plain else model_figures(self._group, model.name),
            "classes": class_table(run, searched, names),
            "class_names": names,
            "confusions": confused,
            "opened": _choose_open(confused, self._board),
            "largest_matrix": LARGEST_MATRIX,
            "together": together(run, searched, self._board.title),
            "ensembles": ensembles(done),
        }

    def _images(self, model: ModelResults) -> dict[str, object]:
        originals = self._group.originals
        triples: list[Triple] = []
        strips: list[Levels] = []
        if originals is not None and not self._plain:
            turn = [one.name for one in self._group.models].index(model.name)
            triples = examples(self._group.run, model.cells, originals, places(self._disputed, turn))
            strips = levels(self._group.run, model.cells, originals)
        return {
            "triples": triples,
            "levels": strips,
            "why_no_triples": self._plain or (NO_ORIGINALS if originals is None else NO_EXAMPLES),
        }

    def flow(self, model: ModelResults) -> Page:
        """The page of a flow."""
        run = replace(self._group.run, cells=list(model.cells))
        content = body(
            "model_flow.html.j2",
            **self._common(model),
            parts=nll_parts(run),
            nll_caption=caption(run),
            section=flow_section(run, model, self._scored),
            no_shots=NO_SHOTS,
        )
        return self._page(model, content)

    def _common(self, model: ModelResults) -> dict[str, object]:
        run = self._group.run
        return {
            "run": run,
            "group": self._group,
            "model": model,
            "defense": model.first.cell.defense,
            "card": self._group.card(model.name),
            "sha256": model.first.cell.model_sha256,
            "unfinished": list_unfinished(run, model.cells),
            "n_attacks": len(model.cells),
            "copy_button": True,
        }

    def _page(self, model: ModelResults, content: Markup) -> Page:
        return Page(
            path=self._group.model_path(model.name),
            title=model.name,
            kind="model",
            body=content,
            crumbs=((self._group.title, self._group.board_path()),),
            provenance=provenance(self._group, model.cells),
            description=f"{model.name} on {self._group.run.dataset} under {count_noun(len(model.cells), 'attack')}.",
        )


@dataclass(frozen=True)
class _Details:
    """What attack_details.html.j2 shows.

    Attributes:
        name: of the model.
        lines: its attacks.
        nll_flows: names of the flows that scored its images.
        scores: names of its Fréchet distances.
        footnotes: on those.
    """

    name: str
    lines: tuple[AttackLine, ...]
    nll_flows: tuple[str, ...]
    scores: tuple[str, ...]
    footnotes: tuple[str, ...]


def accuracy_lines(
    group: Group, rows: Sequence[TableRow], lines: Sequence[AttackLine], results: Sequence[CellResult]
) -> list[AccuracyLine]:
    """Clean, the attacks, worst cases that combine several, the average. rows: all of the model."""
    found: list[AccuracyLine] = []
    by_label = {line.attack.label: line for line in lines}
    engines = {r.cell.attack.label: parity_note(r.cell) for r in results}
    members = _members(adversaries(results))
    for row in rows:
        if row.metric == "accuracy" and row.attack in by_label:
            path = group.attack_path(row.attack)
            line = AccuracyLine(
                row.attack, engines[row.attack], path, row, by_label[row.attack], _missing(row)
            )
            found.append(line)
        elif row.kind.accuracy and _tells(row, members) and not _mixes(group, row):
            found.append(AccuracyLine(_title(row), "", "", row, None, _missing(row)))
    return found


def _members(results: Sequence[CellResult]) -> Mapping[Threat | None, int]:
    """How many attacks a threat model and budget has."""
    return Counter(result.cell.attack.threat for result in results)


def _tells(row: TableRow, members: Mapping[Threat | None, int]) -> bool:
    """Whether a combined number is another than that of a single attack, or of all."""
    if row.attack != WORST_CASE or row.threat_model == ALL_THREATS:
        return True
    return members.get((row.threat_model, row.epsilon, row.eta), 0) > 1 and len(members) > 1


def _mixes(group: Group, row: TableRow) -> bool:
    """Whether a number combines several budgets and steps of a sweep, which says nothing."""
    return group.is_sweep and row.threat_model == ALL_THREATS


def _title(row: TableRow) -> str:
    if row.metric == ROBUST_ACCURACY.name:
        return f"{row.attack}, robust accuracy"
    if row.attack == WORST_CASE and row.threat_model != ALL_THREATS:
        budget = budget_words(row.epsilon, row.eta)
        return f"worst case, {row.threat_model}" + (f", {budget}" if budget else "")
    return {
        CLEAN: "clean",
        WORST_CASE: "worst case over all attacks",
        AVERAGE: "average of clean and all attacks",
    }.get(row.attack, f"mean over {row.attack}")


def _missing(row: TableRow) -> str:
    if row.measured:
        return ""
    return f"{row.status} ({row.note})" if row.note else row.status


def _headline(rows: Sequence[TableRow]) -> list[tuple[str, TableRow]]:
    """Clean accuracy, then the worst case of each threat model and budget."""
    rejecting = " with rejection" if rows and rows[0].detector else ""
    found = [(f"clean accuracy{rejecting}", row) for row in rows if row.attack == CLEAN and row.kind.accuracy]
    worst = [
        row
        for row in rows
        if row.attack == WORST_CASE and row.threat_model != ALL_THREATS and row.kind.accuracy
    ]
    return found + [
        (_title(row).replace("worst case", f"worst case{rejecting}:", 1).replace(":,", ":"), row)
        for row in worst
    ]


def _ranks(board: Board) -> dict[str, str]:
    """Ranks by model name on a leaderboard; empty where it has none."""
    table = board.accuracies
    place = table.column(RANK) if table is not None else None
    if table is None or place is None:
        return {}
    return {line[0].text: line[place].text for line in table.lines if line[place].kind == "rank"}


def _choose_open(found: Sequence[Confusion], board: Board) -> str:
    """The attack whose confusions are open at first: that of the leaderboard which left the fewest right."""
    labels = {attack.label for attack in board.attacks}
    mine = [one for one in found if one.label in labels] or list(found)
    return min(mine, key=lambda one: one.right).label if mine else ""


def together(run: Run, results: Sequence[CellResult], first: str = "") -> list[Together]:
    """Joint counts over the finished attacks of each threat model and budget that has several, that called `first`
    before the others; then over all."""
    done = complete(run, adversaries(results))
    groups: dict[str, list[CellResult]] = {}
    for result in done:
        if result.cell.attack.threat is not None:
            groups.setdefault(threat_title(result.cell.attack), []).append(result)
    found = [Together(title, joint(group)) for title, group in groups.items() if len(group) > 1]
    if len(groups) > 1:
        found.append(Together("All attacks", joint(done)))
    return sorted(found, key=lambda one: one.title != first)


def signs(results: Sequence[CellResult]) -> list[Sign]:
    """What is suspicious, each text once with the attacks that say it."""
    found: dict[str, list[str]] = {}
    for result in results:
        for text in result.cell.doubts:
            found.setdefault(text, []).append(result.cell.attack.label)
    return [Sign(text, tuple(labels)) for text, labels in found.items()]


def notes(rows: Sequence[TableRow]) -> list[str]:
    """What must be known of single numbers, as near ties; without failures and suspicions, which stand apart."""
    measured = [row for row in rows if row.measured]
    plain = [replace(row, suspicions=()) for row in measured]
    return [line.partition(", ")[2] for line in wording.problems(plain)]


def list_unfinished(run: Run, results: Sequence[CellResult]) -> list[tuple[str, str, str]]:
    """(attack, status, reason) of the cells that have no number."""
    states = [(result.cell.attack.label, *cell_status(run, result)) for result in results]
    return [(label, status, reason) for label, status, reason in states if status != "ok"]
