"""What comparisons found, for machines: JSON, JUnit XML, GitHub annotations."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from robbench.compare.comparison import FAILS, WITHOUT_NUMBER, Comparison, Value

# What XML 1.0 has no way to write.
_NO_XML = dict.fromkeys((*range(9), 11, 12, *range(14, 32), *range(0xD800, 0xE000), 0xFFFE, 0xFFFF))


def reason_of(found: Comparison) -> str:
    """Why, with the numbers where a number failed."""
    if found.verdict in ("worse", "failed") and not found.reason:
        return _fall(found)
    if found.tolerance is None or found.verdict != "fail" or None in (found.a.value, found.b.value):
        return found.reason
    numbers = (
        f"measured {found.b.value:.6g}, reference {found.a.value:.6g}, allowed {found.tolerance:.3g}"
        + (f" ({found.basis})" if found.basis else "")
    )
    return "; ".join(filter(None, (numbers, found.reason)))


def _fall(found: Comparison) -> str:
    values = [side.status if side.value is None else f"{side.value:.6g}" for side in (found.a, found.b)]
    texts = [f"{values[0]} -> {values[1]} {found.unit}", found.b.note if found.verdict == "failed" else ""]
    if None not in (found.difference, found.lower, found.upper):
        texts[0] += f" ({found.difference:+.3g} [{found.lower:+.3g}, {found.upper:+.3g}])"
    if found.p_adjusted is not None:
        texts.append(f"p = {found.p_adjusted:.2g}, {len(found.fell)} samples fell, {len(found.rose)} rose")
    return "; ".join(filter(None, texts))


def as_json(results: Sequence[Comparison], passed: bool, about: dict[str, Value]) -> str:
    """A JSON document: `about`, whether the check passed, counts of verdicts, every finding. NaN becomes null."""
    counts = {name: sum(r.verdict == name for r in results) for name in ("pass", "fail", "not run")}
    document = {
        "schema_version": 1,
        **about,
        "passed": passed,
        "counts": {**counts, "regressions": sum(r.regression for r in results)},
        "findings": [_finding(result) for result in results],
    }
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _finding(result: Comparison) -> dict[str, Any]:
    return {
        "group": result.model,
        "name": result.name,
        "verdict": result.verdict,
        "reason": reason_of(result),
        "gate": result.gate,
        "path": str(result.path),
        "line": result.line,
        "values": {name: finite(value) for name, value in result.values.items()},
    }


def finite(value: Value) -> Value:
    """The value, or None for NaN and infinity, which JSON cannot write."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_junit(title: str, results: Sequence[Comparison], problems: Sequence[str] = ()) -> str:
    """JUnit XML: one suite `title`, one case a comparison. A regression is a failure; what has no number, and what
    differs without gating, is skipped with its reason. problems: failures that belong to no comparison."""
    suites = ElementTree.Element("testsuites", {"name": _xml(" ".join(title.split()[:2]))})
    suite = ElementTree.SubElement(suites, "testsuite", {"name": _xml(title)})
    for result in results:
        _case(suite, result)
    for problem in problems:
        place = {"classname": "run", "name": "complete", "time": "0"}
        case = ElementTree.SubElement(suite, "testcase", place)
        ElementTree.SubElement(case, "failure", {"message": _xml(problem), "type": "incomplete"})
    for node in (suites, suite):
        node.set("tests", str(len(suite)))
        node.set("failures", str(len(suite.findall("testcase/failure"))))
        node.set("errors", "0")
        node.set("skipped", str(len(suite.findall("testcase/skipped"))))
        node.set("time", "0")
    ElementTree.indent(suites)
    text: str = ElementTree.tostring(suites, encoding="unicode")
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{text}\n'


def _case(suite: ElementTree.Element, result: Comparison) -> None:
    place = {"classname": _xml(result.model or "-"), "name": _xml(result.name), "time": "0"}
    case, reason = ElementTree.SubElement(suite, "testcase", place), reason_of(result)
    if result.regression:
        message = {"message": _xml(reason or result.verdict), "type": "regression"}
        numbers = [f"{key}: {value}" for key, value in result.values.items()]
        text = "\n".join([f"{result.path}:{result.line}", *numbers])
        ElementTree.SubElement(case, "failure", message).text = _xml(text)
    elif result.verdict in WITHOUT_NUMBER:
        ElementTree.SubElement(case, "skipped", {"message": _xml(reason or result.verdict)})
    elif result.verdict in FAILS:
        ElementTree.SubElement(case, "skipped", {"message": _xml(f"differs, does not gate: {reason}")})


def _xml(text: str) -> str:
    return text.translate(_NO_XML)


def annotations(title: str, results: Sequence[Comparison], problems: Sequence[str] = ()) -> list[str]:
    """Workflow commands of GitHub Actions, one line each: errors for regressions, notices for what differs without
    gating. A file is named where the reference is one; relative to the working directory where it lies in it."""
    lines = [_annotation("error" if r.regression else "notice", r) for r in results if r.verdict in FAILS]
    return [*lines, *(f"::error title={_property(title)}::{_data(problem)}" for problem in problems)]


def _annotation(level: str, result: Comparison) -> str:
    path = result.path
    if path.is_absolute() and path.is_relative_to(Path.cwd()):
        path = path.relative_to(Path.cwd())
    title = f"{result.model} {result.name}"
    place = f"file={_property(str(path))},line={result.line}," if path != Path() else ""
    return f"::{level} {place}title={_property(title)}::{_data(f'{title}: {reason_of(result)}')}"


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
