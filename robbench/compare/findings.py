"""What a check found, for machines: JSON, JUnit XML, GitHub annotations. One finding a comparison."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from xml.etree import ElementTree

from robbench.compare.tables import CheckResult, Verdict

Value = str | int | float | bool | None
# What XML 1.0 has no way to write.
_NO_XML = dict.fromkeys((*range(9), 11, 12, *range(14, 32), 65534, 65535))


@dataclass(frozen=True)
class Finding:
    """One comparison. group: the model; name: attack and what of it. gate: whether a fail fails the check. path, line:
    of the reference. values: numbers behind the verdict."""

    group: str
    name: str
    verdict: Verdict
    reason: str
    gate: bool
    path: Path
    line: int = 1
    values: dict[str, Value] = field(default_factory=dict)

    @property
    def regression(self) -> bool:
        return self.verdict == "fail" and self.gate


def of_table(result: CheckResult) -> Finding:
    """The finding of a comparison with a table's row."""
    reference, measured = result.reference, result.measured
    value = None if measured is None else measured.value
    texts = [result.reason]
    if result.verdict == "fail" and value is not None and result.tolerance is not None:
        numbers = f"measured {value:.6g}, reference {reference.value:.6g}, allowed {result.tolerance:.3g}"
        texts.insert(0, numbers + (f" ({result.basis})" if result.basis else ""))
    return Finding(
        group=reference.model,
        name=f"{reference.attack} {reference.metric}"
        + (f" ({reference.threat_model})" if reference.attack == "worst-case" else ""),
        verdict=result.verdict,
        reason="; ".join(text for text in texts if text),
        gate=reference.gate,
        path=reference.path,
        line=reference.line,
        values={
            "dataset": reference.dataset,
            "reference": reference.value,
            "measured": value,
            "difference": result.difference,
            "tolerance": result.tolerance,
            "basis": result.basis,
            "n": None if measured is None else measured.n,
            "reference_n": reference.n,
        },
    )


# ------------------------------------------------------------------------------------------------------- JSON
def as_json(findings: Sequence[Finding], passed: bool, about: dict[str, Value]) -> str:
    """A JSON document: `about`, whether the check passed, counts of verdicts, every finding. NaN becomes null."""
    counts = {name: sum(f.verdict == name for f in findings) for name in ("pass", "fail", "not run")}
    document = {
        "schema_version": 1,
        **about,
        "passed": passed,
        "counts": {**counts, "regressions": sum(f.regression for f in findings)},
        "findings": [
            {**asdict(f), "path": str(f.path), "values": {k: _finite(v) for k, v in f.values.items()}}
            for f in findings
        ],
    }
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _finite(value: Value) -> Value:
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ------------------------------------------------------------------------------------------------------ JUnit
def as_junit(findings: Sequence[Finding], run: Path, problems: Sequence[str] = ()) -> str:
    """JUnit XML: one suite, one case a finding. A regression is a failure; "not run", and what differs without gating,
    is skipped with its reason. problems: failures that belong to no comparison."""
    skipped = [f for f in findings if f.verdict == "not run" or (f.verdict == "fail" and not f.gate)]
    counts = {
        "tests": len(findings) + len(problems),
        "failures": sum(f.regression for f in findings) + len(problems),
        "errors": 0,
        "skipped": len(skipped),
    }
    numbers = {name: str(count) for name, count in counts.items()}
    suites = ElementTree.Element("testsuites", {"name": "robbench check", **numbers, "time": "0"})
    name = _xml(f"robbench check {run}")
    suite = ElementTree.SubElement(suites, "testsuite", {"name": name, **numbers, "time": "0"})
    for finding in findings:
        _case(suite, finding)
    for problem in problems:
        case = ElementTree.SubElement(
            suite, "testcase", {"classname": "run", "name": "complete", "time": "0"}
        )
        ElementTree.SubElement(case, "failure", {"message": _xml(problem), "type": "incomplete"})
    ElementTree.indent(suites)
    text: str = ElementTree.tostring(suites, encoding="unicode")
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{text}\n'


def _case(suite: ElementTree.Element, finding: Finding) -> None:
    place = {"classname": _xml(finding.group or "-"), "name": _xml(finding.name), "time": "0"}
    case = ElementTree.SubElement(suite, "testcase", place)
    message = {"message": _xml(finding.reason or finding.verdict)}
    if finding.regression:
        failure = ElementTree.SubElement(case, "failure", {**message, "type": "regression"})
        numbers = "\n".join(f"{key}: {value}" for key, value in finding.values.items())
        failure.text = _xml(f"{finding.path}:{finding.line}\n{numbers}")
    elif finding.verdict == "not run":
        ElementTree.SubElement(case, "skipped", message)
    elif finding.verdict == "fail":
        ElementTree.SubElement(
            case, "skipped", {"message": _xml(f"differs, does not gate: {finding.reason}")}
        )


def _xml(text: str) -> str:
    return text.translate(_NO_XML)


# ----------------------------------------------------------------------------------------------------- GitHub
def annotations(findings: Sequence[Finding], problems: Sequence[str] = ()) -> list[str]:
    """Workflow commands of GitHub Actions, one line each: errors for regressions, notices for what differs without
    gating. Files are named relative to the working directory where they lie in it."""
    lines = [_annotation("error" if f.regression else "notice", f) for f in findings if f.verdict == "fail"]
    return [*lines, *(f"::error title=robbench check::{_data(problem)}" for problem in problems)]


def _annotation(level: str, finding: Finding) -> str:
    path = finding.path
    if path.is_absolute() and path.is_relative_to(Path.cwd()):
        path = path.relative_to(Path.cwd())
    title = _property(f"{finding.group} {finding.name}")
    reason = _data(f"{finding.group} {finding.name}: {finding.reason}")
    return f"::{level} file={_property(str(path))},line={finding.line},title={title}::{reason}"


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
