"""What `robbench check` does, from its options to files, lines on the terminal and a verdict."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from robbench.compare.comparison import Comparison, Value
from robbench.compare.documents import annotations, as_json, as_junit
from robbench.compare.paired import compare_samples
from robbench.compare.policy import Policy, PolicyName
from robbench.compare.samples import SUFFIX, of_run, read_samples, write_reference
from robbench.compare.tables import check, list_compared, without_reference
from robbench.compare.update import require_reason, update_tables
from robbench.core.errors import UserError
from robbench.core.places import check_output_file
from robbench.core.resources import write_text_atomically
from robbench.core.terminal import Terminal, print_line
from robbench.report.check_text import print_paired, print_results
from robbench.results.tables import leaderboard
from robbench.store.ledger import RUN_FILE, load_run
from robbench.store.records import Run

if TYPE_CHECKING:
    from rich.console import Console

TITLE = "robbench check"


@dataclass(frozen=True)
class CheckRequest:
    """Options of `robbench check`.

    Attributes:
        run_folder: the run.
        against: tables, folders of tables, reference runs or run folders.
        tolerance, tolerance_policy: how far numbers may lie apart.
        complete: every accuracy (of flows every bits/dim) of the run must have a reference, and the run every cell of a
            reference run.
        json, junit: files to write.
        output: "github": annotations, too.
        update, write_reference, reason: what to write as the new reference, and why.
    """

    run_folder: Path
    against: tuple[Path, ...] = ()
    tolerance: float | None = None
    tolerance_policy: PolicyName = "default"
    complete: bool = False
    json: Path | None = None
    junit: Path | None = None
    output: Literal["text", "github"] = "text"
    update: bool = False
    write_reference: Path | None = None
    reason: str | None = None

    @property
    def policy(self) -> Policy:
        """The tolerances of numbers in tables; reference runs have `paired.RULES`."""
        return Policy(self.tolerance_policy, self.tolerance)


@dataclass
class _Outcome:
    """What the references said. problems: failures that belong to no comparison; empty: references of which nothing was
    compared, as problems for machines; compared: "model x attack" of what has a verdict."""

    passed: bool = True
    results: list[Comparison] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)
    compared: set[str] = field(default_factory=set)


def check_run(request: CheckRequest) -> bool:
    """Compare a run with references, print and write what came of it; True when it passed."""
    _consistent(request)
    check_output_file(request.json, "--json")
    check_output_file(request.junit, "--junit")
    check_output_file(request.write_reference, "--write-reference")
    run, console = load_run(request.run_folder), Terminal()
    passed = _check(run, request, console) if request.against else True
    if request.write_reference is not None:  # last: it stays what it was when the check cannot be done
        path, reason = request.write_reference, require_reason(request.reason, "--write-reference")
        entry = write_reference(of_run(run), path, reason)
        print_line(console, f"wrote {path}: {entry.changes}, {path.stat().st_size / 1024:.0f} KB")
    return passed


def _check(run: Run, request: CheckRequest, console: "Console") -> bool:
    if request.update:  # all tables, or none of them
        rows, tolerance = leaderboard(run), request.tolerance
        results = [r for path in request.against for r in check(rows, path, tolerance, request.policy)]
        for update in update_tables(results, require_reason(request.reason, "--update")):
            print_line(console, f"updated {update.text}")
    outcome = _compare(run, request, console)
    for problem in outcome.problems:
        print_line(console, problem, "red")
    passed = outcome.passed and not outcome.problems
    outcome.problems += outcome.empty  # a person has read it already
    _write_files(outcome, passed, request, console)
    return passed


def _consistent(request: CheckRequest) -> None:
    """`UserError` for options that contradict each other, or that nothing would come of."""
    if not request.against and request.write_reference is None:
        raise UserError("check compares a run with references; name one with --against FILE_OR_FOLDER")
    for option, given in (("--update", request.update), ("--write-reference", request.write_reference)):
        if given:
            require_reason(request.reason, option)
    if request.reason is not None and not request.update and request.write_reference is None:
        raise UserError("--reason goes with --update or --write-reference; leave it out, or add one of them")
    if request.update and (request.json or request.junit):
        raise UserError("--update changes the reference; run the check again for --json and --junit")
    runs = [path for path in request.against if _is_run(path)]
    if request.update and runs:
        raise UserError(
            f"--update changes tables; for {str(runs[0])!r} write the run as the reference: "
            f"robbench check {request.run_folder} --write-reference FILE{SUFFIX} --reason TEXT"
        )
    files = (("--json", request.json), ("--junit", request.junit), ("--complete", request.complete))
    for option, given in (*files, ("--format github", request.output == "github")):
        if given and not request.against:
            raise UserError(f"{option} is about a comparison; name a reference with --against FILE_OR_FOLDER")
    if request.tolerance is not None and len(runs) == len(request.against):
        raise UserError("--tolerance is for tables; leave it out, reference runs have --tolerance-policy")


def _compare(run: Run, request: CheckRequest, console: "Console") -> _Outcome:
    outcome = _Outcome()
    for path in request.against:
        judge = _against_run if _is_run(path) else _against_tables
        passed, results = judge(run, path, request, outcome, console)
        outcome.passed &= passed
        outcome.results += results
        outcome.compared |= list_compared(results)
        if not passed and not any(result.regression for result in results):
            outcome.empty.append(f"nothing of {path} was measured by the run, so nothing was checked")
    if request.complete:
        names = [name for name in without_reference(leaderboard(run), ()) if name not in outcome.compared]
        if names:
            outcome.problems.append(
                f"no reference number for {len(names)} numbers of the run: {', '.join(names[:5])}"
            )
    return outcome


def _is_run(path: Path) -> bool:
    return path.suffix == SUFFIX or (path / RUN_FILE).is_file()


def _against_tables(
    run: Run, path: Path, request: CheckRequest, outcome: _Outcome, console: "Console"
) -> tuple[bool, Sequence[Comparison]]:
    results = check(leaderboard(run), path, request.tolerance, request.policy)
    return print_results(results, console), results


def _against_run(
    run: Run, path: Path, request: CheckRequest, outcome: _Outcome, console: "Console"
) -> tuple[bool, Sequence[Comparison]]:
    reference = of_run(load_run(path)) if path.is_dir() else read_samples(path)
    results = compare_samples(reference, of_run(run), request.tolerance_policy)
    if reference.identity.history:
        last = reference.identity.history[-1]
        print_line(console, f"reference of {last.date} ({last.reason}; {last.changes})")
    absent = [f"{r.model} x {r.attack}" for r in results if r.verdict == "not run"]
    if request.complete and absent:
        outcome.problems.append(
            f"{len(absent)} cells of the reference are not in the run: {', '.join(absent[:5])}"
        )
    outcome.compared |= {f"{r.model} x clean" for r in results if r.verdict != "not run"}
    return print_paired(results, path, console), results


def _write_files(outcome: _Outcome, passed: bool, request: CheckRequest, console: "Console") -> None:
    results, problems = outcome.results, outcome.problems
    about: dict[str, Value] = {
        "run": str(request.run_folder),
        "against": ", ".join(map(str, request.against)),
        "policy": request.tolerance_policy,
    }
    if problems:
        about["problems"] = "; ".join(problems)
    if request.output == "github":
        for line in annotations(TITLE, results, problems):
            print_line(console, line)
    if request.json is not None:
        write_text_atomically(request.json, as_json(results, passed, about))
    if request.junit is not None:
        write_text_atomically(request.junit, as_junit(f"{TITLE} {request.run_folder}", results, problems))
