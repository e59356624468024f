"""Output of comparisons: Markdown pages, and plain values for JSON."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from robbench.benchmarks.timing import Quartiles, Times, quartiles, quotient
from robbench.core.device import versions
from robbench.core.versions import installed_version


@dataclass
class Verdicts:
    """Verdicts and times of several implementations.

    Attributes:
        robust: number of robust images, by implementation.
        refused: why there are no times; "" where they were measured.
        seconds: quartiles by implementation.
        ratio: quartiles of the quotients to the reference's time in the same round, by implementation.
    """

    robust: dict[str, int]
    refused: str = ""
    seconds: dict[str, Quartiles] = field(default_factory=dict)
    ratio: dict[str, Quartiles] = field(default_factory=dict)

    def add_times(self, times: Times, reference: str) -> None:
        """Fill `seconds` and `ratio` from the times of all rounds."""
        self.seconds = {name: quartiles(values) for name, values in times.items()}
        self.ratio = {name: quotient(values, times[reference]) for name, values in times.items()}

    def table(self, digits: int) -> list[str]:
        """Lines of a Markdown table, seconds with so many `digits`; one line where times were refused."""
        if self.refused:
            return [f"Refused: {self.refused}."]
        rows = (
            [name, str(robust), spread(self.seconds[name], digits), spread(self.ratio[name], 2)]
            for name, robust in self.robust.items()
        )
        return table(("", "robust", "seconds", "ratio"), rows)


def plain(
    command: str, contest: Any, peers: Mapping[str, str], kind: str, found: Iterable[Any]
) -> dict[str, Any]:
    """A comparison as plain values. peers: distributions by name; kind: key of the results `found`."""
    absent = {name: installed_version(package) or "absent" for name, package in peers.items()}
    return {
        "command": command,
        "contest": asdict(contest),
        "versions": {**versions(), **absent},
        kind: [asdict(one) for one in found],
    }


def head(title: str, command: str) -> list[str]:
    """Lines of title and command."""
    return [f"# {title}", "", f"    {command}", ""]


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    lines = [f"| {' | '.join(cells)} |".replace("|  |", "| |") for cells in (header, *rows)]
    return [lines[0], "|" + "---|" * len(header), *lines[1:]]


def missing(absent: Mapping[str, str]) -> list[str]:
    """A line per peer that is not installed."""
    return [f"* {name} is missing: {why}" for name, why in absent.items()]


def page(lines: Iterable[str]) -> str:
    """Lines as the text of a file."""
    return "\n".join(lines).rstrip() + "\n"


def spread(values: Quartiles | None, digits: int) -> str:
    """Quartiles as "median [lower, upper]"."""
    if values is None:
        return "not measured"
    low, middle, high = (f"{value:.{digits}f}" for value in values)
    return f"{middle} [{low}, {high}]"
