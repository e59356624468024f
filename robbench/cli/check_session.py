"""What `robbench check` does, from its options to files, lines on the terminal and a verdict."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from robbench.compare.findings import Finding, Value, annotations, as_json, as_junit, of_table
from robbench.compare.paired import compare_samples
from robbench.compare.policy import Policy, PolicyName
from robbench.compare.samples import SUFFIX, Samples, of_run, read_samples, write_reference
from robbench.compare.tables import check, without_reference
from robbench.compare.update import required_reason, update_tables
from robbench.core.errors import UserError
from robbench.core.places import check_output_file
from robbench.core.resources import write_text_atomically
from robbench.core.terminal import Terminal, print_line
from robbench.report.check_text import print_results
from robbench.report.paired_text import of_paired, print_paired
from robbench.results.tables import leaderboard
from robbench.store.ledger import RUN_FILE, load_run
from robbench.store.records import Run

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class CheckRequest:
    """Options of `robbench check`. against: tables, folders of tables, reference runs or run folders. complete: every
    accuracy (of flows every bits/dim) of the run must have a reference, and the run every cell of a reference run."""

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


@dataclass
class _Outcome:
    """What the references said. problems: failures that belong to no comparison; empty: references of which nothing was
    compared, as problems for machines; compared: "model x attack" of what has a verdict."""

    passed: bool = True
    findings: list[Finding] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)
    compared: set[str] = field(default_factory=set)


def check_run(request: CheckRequest) -> bool:
    """Compare a run with references, print and write what came of it; True when it passed."""
    _consistent(request)
    for option, path in (
        ("--json", request.json),
        ("--junit", request.junit),
        ("--write-reference", request.write_reference),
    ):
        check_output_file(path, option)
    run, console = load_run(request.run_folder), Terminal()
    passed = _checked(run, request, console) if request.against else True
    if (
        request.write_reference is not None
    ):  # last: a reference stays what it was when the check cannot be done
        _write_reference(run, request, console)
    return passed


def _checked(run: Run, request: CheckRequest, console: "Console") -> bool:
    if request.update:
        _update(run, request, console)
    outcome = _compared(run, request, console)
    for problem in outcome.problems:
        print_line(console, problem, "red")
    passed = outcome.passed and not outcome.problems
    outcome.problems += outcome.empty  # a person has read it already
    _write_files(outcome, passed, request, console)
    return passed


def _consistent(request: CheckRequest) -> None:
    if not request.against and request.write_reference is None:
        raise UserError("check compares a run with references; name one with --against FILE_OR_FOLDER")
    for option, given in (("--update", request.update), ("--write-reference", request.write_reference)):
        if given:
            required_reason(request.reason, option)
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
    _used(request, runs)


def _used(request: CheckRequest, runs: Sequence[Path]) -> None:
    """`UserError` for an option that nothing would come of."""
    files = (("--json", request.json), ("--junit", request.junit), ("--complete", request.complete))
    for option, given in (*files, ("--format github", request.output == "github")):
        if given and not request.against:
            raise UserError(f"{option} is about a comparison; name a reference with --against FILE_OR_FOLDER")
    if request.tolerance is not None and len(runs) == len(request.against):
        raise UserError("--tolerance is for tables; leave it out, reference runs have --tolerance-policy")


def _compared(run: Run, request: CheckRequest, console: "Console") -> _Outcome:
    outcome = _Outcome()
    for path in request.against:
        if _is_run(path):
            _against_run(run, path, request, outcome, console)
        else:
            _against_tables(run, path, request, outcome, console)
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
) -> None:
    policy = Policy(request.tolerance_policy, request.tolerance)
    rows = leaderboard(run)
    results = check(rows, path, request.tolerance, policy)
    _note(outcome, print_results(results, console), [of_table(result) for result in results], path)
    outcome.compared |= {
        f"{r.measured.model} x {r.measured.attack}"
        for r in results
        if r.measured is not None and r.verdict != "not run"
    }


def _note(outcome: _Outcome, passed: bool, findings: Sequence[Finding], path: Path) -> None:
    outcome.passed &= passed
    outcome.findings += findings
    if not passed and not any(finding.regression for finding in findings):
        outcome.empty.append(f"nothing of {path} was measured by the run, so nothing was checked")


def _update(run: Run, request: CheckRequest, console: "Console") -> None:
    """Put measured values into all tables, or into none of them."""
    rows, policy = leaderboard(run), Policy(request.tolerance_policy, request.tolerance)
    results = [result for path in request.against for result in check(rows, path, request.tolerance, policy)]
    for change in update_tables(results, required_reason(request.reason, "--update")):
        print_line(console, f"updated {change.text}")


def _against_run(run: Run, path: Path, request: CheckRequest, outcome: _Outcome, console: "Console") -> None:
    reference = _samples(path)
    results = compare_samples(reference, of_run(run), request.tolerance_policy)
    if reference.identity.history:
        last = reference.identity.history[-1]
        print_line(console, f"reference of {last.date} ({last.reason}; {last.changes})")
    passed = print_paired(results, path, console)
    _note(outcome, passed, [of_paired(result, path) for result in results], path)
    absent = [f"{r.model} x {r.attack}" for r in results if r.verdict == "not run"]
    if request.complete and absent:
        outcome.problems.append(
            f"{len(absent)} cells of the reference are not in the run: {', '.join(absent[:5])}"
        )
    outcome.compared |= {
        name
        for r in results
        if r.verdict != "not run"
        for name in (f"{r.model} x {r.attack}", f"{r.model} x clean")
    }


def _samples(path: Path) -> Samples:
    return of_run(load_run(path)) if path.is_dir() else read_samples(path)


def _write_reference(run: Run, request: CheckRequest, console: "Console") -> None:
    assert request.write_reference is not None
    path, reason = request.write_reference, required_reason(request.reason, "--write-reference")
    entry = write_reference(of_run(run), path, reason)
    print_line(console, f"wrote {path}: {entry.changes}, {path.stat().st_size / 1024:.0f} KB")


def _write_files(outcome: _Outcome, passed: bool, request: CheckRequest, console: "Console") -> None:
    about: dict[str, Value] = {
        "run": str(request.run_folder),
        "against": ", ".join(map(str, request.against)),
        "policy": request.tolerance_policy,
    }
    if request.output == "github":
        for line in annotations(outcome.findings, outcome.problems):
            print_line(console, line)
    if request.json is not None:
        write_text_atomically(
            request.json, as_json(outcome.findings, passed, about | _problems(outcome.problems))
        )
    if request.junit is not None:
        write_text_atomically(request.junit, as_junit(outcome.findings, request.run_folder, outcome.problems))


def _problems(problems: Sequence[str]) -> dict[str, Value]:
    return {"problems": "; ".join(problems)} if problems else {}
