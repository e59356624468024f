"""What `robbench run --experiment` does, from a request to files and lines on the terminal."""

import shlex
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import get_args

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from robbench.cli.base import print_paths
from robbench.cli.run import run_matrix
from robbench.core.counting import count_noun
from robbench.core.device import resolve_device
from robbench.core.errors import UserError
from robbench.core.terminal import Terminal, print_line
from robbench.defenses.plan import TrainRequest
from robbench.experiments.cost import ExperimentCosts
from robbench.experiments.request import ExperimentRequest
from robbench.experiments.runs import (
    CORRUPTIONS,
    ExperimentPlan,
    claim,
    plan_experiment,
    resolve_use,
    train_absent,
)
from robbench.experiments.schema import SETTINGS
from robbench.experiments.settings import measure_settings
from robbench.experiments.table import (
    Line,
    Measurements,
    comparison,
    printed_cells,
    texts,
    write_comparison,
)
from robbench.experiments.verdicts import Setting, Verdict
from robbench.results.rows import CLEAN
from robbench.results.wording import ANY_ITERATE
from robbench.run.frechet import FrechetRequest, score_run
from robbench.run.rates import format_hours
from robbench.specs import ResolvedAttack, threat_models
from robbench.store.ledger import load_run
from robbench.store.records import Run

Train = Callable[[TrainRequest], Path]


def run_experiment(request: ExperimentRequest, folder: Path, train: Train, fresh: bool = False) -> int:
    """Train, attack, score and compare in `folder`; returns the number of cells and trainings that failed.

    train: trains one model and returns its folder. fresh: put finished cells aside; trained models stay.
    """
    plan = plan_experiment(request, folder)
    console = Terminal()
    _print_head(console, plan)
    claim(plan)
    failed = train_absent(plan, train, lambda line: print_line(console, line))
    requested = plan.run_request(failed)
    possible = bool(requested.models and requested.resolved)
    broken = run_matrix(requested, plan.run_folder, fresh) if possible else 0
    not_scored = _score_images(plan, console) if plan.wants_images and possible else ""
    run = load_run(plan.run_folder) if plan.run_folder.is_dir() else None
    lines = compare(plan, run, failed, not_scored)
    title = f"{request.experiment.title} ({request.note})"
    paths = write_comparison(folder, title, _notes(plan), lines)
    _print_comparison(console, title, lines)
    print_paths(paths)
    return broken + len(failed)


def compare(
    plan: ExperimentPlan, run: Run | None, failed: Mapping[str, str], not_scored: str = ""
) -> list[Line]:
    """The table of a plan, as far as its run is done. failed: why trainings failed, by the model's name."""
    experiment = plan.request.experiment
    folders = {name: plan.names(name) for name in (*experiment.models, *experiment.detectors)}
    published = printed_cells(experiment.published) if experiment.published else None
    corruptions = [attack.label for attack in plan.attacks if attack.threat_model == CORRUPTIONS]
    measured = Measurements(
        run,
        folders,
        failed,
        plan.left_out(failed),
        corruptions,
        absent=plan.absent,
        not_scored=not_scored,
        uncorrupted=plan.uncorrupted,
        settings=measure_settings(plan.request),
    )
    cells = _attacks(plan)
    labels = {cell: attack.label if attack else CLEAN for cell, attack in cells.items()}
    return comparison(experiment, measured, labels, plan.request.differs, published, _settings(plan, cells))


def _attacks(plan: ExperimentPlan) -> dict[tuple[str, str], ResolvedAttack | None]:
    """The attack of every cell of the table, by its titles."""
    experiment, known = plan.request.experiment, threat_models(plan.request.threat_models)
    attacks = {}
    for row, column in product(experiment.rows, experiment.columns):
        use = experiment.attack_of(row, column)
        runs = use is not None and not (row.needs or column.needs or plan.absent)
        attacks[row.title, column.title] = (
            resolve_use(use, plan.request.family, known) if use is not None and runs else None
        )
    return attacks


def _settings(
    plan: ExperimentPlan, attacks: Mapping[tuple[str, str], ResolvedAttack | None]
) -> dict[tuple[str, str], Setting]:
    """Data set, architecture and budget of every cell that robbench can compute."""
    architectures = {job.member: job.outlined.architecture.name for job in plan.jobs}
    guarded = {name: spec.model for name, spec in plan.request.experiment.detectors.items()}
    settings = {}
    for row, column in product(plan.request.experiment.rows, plan.request.experiment.columns):
        model = row.difference[0] if row.difference else row.model_of(column.title)
        model = guarded.get(model or "", model)
        if model not in architectures or column.needs or column.metric in SETTINGS:
            continue
        attack = attacks[row.title, column.title]
        settings[row.title, column.title] = Setting(
            dataset=plan.request.dataset,
            architecture=architectures[model],
            epsilon=attack.epsilon if attack else None,
            eta=attack.eta if attack else None,
        )
    return settings


def _score_images(plan: ExperimentPlan, console: Console) -> str:
    """Score the run's images; why it could not be, empty when it could."""
    request = plan.request
    scoring = FrechetRequest(
        fid_weights=request.fid_weights,
        data_dir=request.data_dir,
        data=request.data,
        zoo=request.zoo,
        device=request.device,
    )
    try:
        score_run(plan.run_folder, scoring, _Silent(console))
    except UserError as error:
        print_line(console, f"no Frechet distances: {error}", "red")
        return " ".join(str(error).split())
    return ""


class _Silent:
    """Scoring without a bar; what a user must see is printed."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def advanced(self, what: str, done: int, total: int) -> None:
        if done == total:
            self.message(f"{what}: features of {total} images")

    def message(self, line: str) -> None:
        print_line(self._console, line)


def dry_run_experiment(request: ExperimentRequest, folder: Path) -> None:
    """Print what would be trained and attacked, the model calls, and hours on this device; computes nothing else."""
    plan = plan_experiment(request, folder)
    console = Terminal()
    _print_head(console, plan)
    costs = ExperimentCosts(plan)
    trainings, cells = costs.trainings(), costs.cells()
    if trainings:
        table = _table("training", ("epochs", "images", "forwards", "backwards", "hours"))
        for one in trainings:
            job = one.job
            name = job.name if job.finished is None else f"{job.name} (trained already)"
            sizes = (job.outlined.recipe.epochs, job.train_samples, one.forwards, one.backwards)
            table.add_row(name, *(f"{size:,}" for size in sizes), format_hours(one.hours))
        console.print(table)
    if cells:
        table = _table("model", ("attack", "forwards", "backwards", "hours"))
        for cell in cells:
            table.add_row(
                cell.model, cell.attack, f"{cell.forwards:,}", f"{cell.backwards:,}", format_hours(cell.hours)
            )
        console.print(table)
    for line in compare_missing(plan):
        print_line(console, line)
    if plan.guards:
        found = count_noun(len(plan.guards), "detector")
        print_line(console, f"not counted: trainings and scores of {found}")
    hours = [format_hours(sum(one.hours for one in some)) for some in (trainings, cells)]
    forwards = sum(t.forwards for t in trainings) + sum(c.forwards for c in cells)
    backwards = sum(t.backwards for t in trainings) + sum(c.backwards for c in cells)
    console.print(
        f"{len(trainings)} trainings and {len(cells)} cells of {plan.n:,} test images; at most {forwards:,} forwards "
        f"and {backwards:,} backwards; {hours[0]} hours of training and {hours[1]} of attacks at the rates measured on "
        f"{resolve_device(request.device)} just now (a sample that breaks early needs less). A latent or joint step is "
        f"one call through flow and classifier. Nothing was computed.",
        highlight=False,
        soft_wrap=True,
    )


def compare_missing(plan: ExperimentPlan) -> list[str]:
    """ "not run: needs Elastic (7 cells)", one line per reason, for what robbench cannot compute."""
    reasons = Counter(line.measured.reason for line in compare(plan, None, {}) if line.measured.needs)
    return [f"not run: {reason} ({count} of the table's cells)" for reason, count in reasons.items()]


def _print_head(console: Console, plan: ExperimentPlan) -> None:
    request = plan.request
    print_line(console, f"{request.experiment.title} ({request.note})", "bold")
    for note in _notes(plan):
        print_line(console, f"- {note}")


def _notes(plan: ExperimentPlan) -> list[str]:
    """What a reader of the table must know."""
    request, experiment = plan.request, plan.request.experiment
    notes = [f"source: {experiment.source}"]
    if request.differs:
        notes.append(
            f"{request.differs}: another experiment than the paper's, no number is compared with print"
        )
    if not request.scale.full:
        notes.append(
            f"{request.scale.label}: epochs, training and test images times {request.scale.factor:g} (at least 1, 16 "
            f"and 8), flows' steps, blocks and width times its root; classifiers and attacks as they are"
        )
    if plan.absent:
        notes.append(f"not run: needs {plan.absent}; bring it with --data FOLDER")
    notes += [f"doubt: {doubt}" for doubt in experiment.doubts]
    notes += [f"different here: {difference}" for difference in experiment.differences]
    if any(attack.target != "flow" for attack in plan.attacks):
        notes.append(f"different here: {ANY_ITERATE}")
    return [*notes, f"command: {_command(request)}"]


def _command(request: ExperimentRequest) -> str:
    """The command line without places and device."""
    words = ["robbench", "run", "--experiment", request.requested or request.experiment.name]
    words += [] if request.scale.full else ["--scale", f"{request.scale.factor:g}"]
    words += [] if request.n is None else ["--n", f"{request.n}"]
    words += ["--seed", f"{request.seed}"] if request.seed else []
    return shlex.join(words)


def _print_comparison(console: Console, title: str, lines: Sequence[Line]) -> None:
    console.print()
    print_line(console, title, "bold")
    for row in dict.fromkeys(line.row for line in lines):
        console.print()
        print_line(console, row, "bold")
        table = _table("", ("published", "measured", "n", "difference", "verdict"))
        for line in lines:
            if line.row == row:
                table.add_row(*(Text(cell) for cell in (line.column, *texts(line))))
        console.print(table)
    counted = Counter(line.verdict for line in lines)
    text = ", ".join(f"{counted[verdict]} {verdict}" for verdict in get_args(Verdict) if counted[verdict])
    console.print(text, highlight=False)


def _table(first: str, others: Sequence[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column(first, overflow="fold")
    for name in others:
        text = name in ("", "attack", "measured", "verdict")
        table.add_column(name, justify="left" if text else "right", overflow="fold")
    return table
