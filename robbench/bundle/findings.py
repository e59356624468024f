"""Results of a verification: one finding per check and cell, and the overall result. No torch here."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

# weaker: agrees, but only with other content of the bundle; unchecked: not possible, for the stated reason.
Verdict = Literal["agrees", "weaker", "differs", "unchecked"]
WHOLE = ""  # model of a finding about the whole bundle
AGREES, DIFFERS, UNCHECKED = 0, 1, 3  # exit codes; 2 is a bundle or command that cannot be used


@dataclass(frozen=True)
class Finding:
    """One check of one cell, model or bundle.

    Attributes:
        model: name of the model; `WHOLE` for a finding about the whole bundle.
        attack: label of the attack; "" for a finding about no single attack.
        check: name of the check.
        verdict: its result.
        count: number of compared items.
        reason: what differs or is missing, or a remark.
        near_ties: number of compared verdicts that rounding decides; they are not judged.
    """

    model: str
    attack: str
    check: str
    verdict: Verdict
    count: int = 0
    reason: str = ""
    near_ties: int = 0


def judge(
    model: str, attack: str, check: str, count: int, problems: Sequence[str], near_ties: int = 0
) -> Finding:
    """A finding that "differs" where there are problems, of which the first ones are its reason, and else "agrees"."""
    more = f" (+{len(problems) - 3} more)" if len(problems) > 3 else ""
    reason = "; ".join(problems[:3]) + more
    return Finding(model, attack, check, "differs" if problems else "agrees", count, reason, near_ties)


@dataclass
class Verification:
    """All findings about one bundle. about: bundle, hash, versions, choices; notes: further remarks. files_only: no
    models were used, so that unchecked findings do not fail."""

    about: dict[str, Any] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    files_only: bool = False

    def of(self, *verdicts: Verdict) -> list[Finding]:
        """The findings with one of these verdicts."""
        return [finding for finding in self.findings if finding.verdict in verdicts]

    @property
    def exit_code(self) -> int:
        """0: everything agrees; 1: something differs; 3: nothing differs, but something could not be checked."""
        if self.of("differs"):
            return DIFFERS
        return UNCHECKED if self.of("unchecked") and not self.files_only else AGREES

    def as_dict(self) -> dict[str, Any]:
        """The verification as JSON values."""
        counts = {verdict: len(self.of(verdict)) for verdict in ("agrees", "weaker", "differs", "unchecked")}
        return {
            "schema_version": 1,
            **self.about,
            "files_only": self.files_only,
            "exit_code": self.exit_code,
            "counts": {**counts, "near_ties": sum(finding.near_ties for finding in self.findings)},
            "notes": self.notes,
            "findings": [asdict(finding) for finding in self.findings],
        }


def models_of(findings: Iterable[Finding]) -> list[str]:
    """The models that findings are about, in order of appearance."""
    return list(dict.fromkeys(finding.model for finding in findings if finding.model != WHOLE))
