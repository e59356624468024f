"""A badge for a README: one number of a run as a small SVG, or as JSON for shields.io's endpoint badge.

The colour says nothing about good and bad, which depends on data set and threat model; a number that the run itself
calls suspicious says so in its text, and so does a worst case or average that leaves out attacks of its run.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from robbench.core.errors import UserError, known_name
from robbench.results.rows import OBLIVIOUS, WORST_CASE, ModelResults, TableRow, of_kind
from robbench.results.tables import ALL_THREATS, leaderboard
from robbench.results.wording import partial_note
from robbench.specs import attack_among
from robbench.store.records import Run

# White text on each has a contrast of at least 4.5 : 1 (WCAG AA): 9.4, 6.6 and 5.9.
LABEL_COLOUR, PLAIN_COLOUR, SUSPICIOUS_COLOUR = "#444444", "#0b5cad", "#8a5a00"
FONT = "Verdana,DejaVu Sans,Geneva,sans-serif"
HEIGHT, PADDING, FONT_SIZE = 20, 6, 11
# Advance widths at 11 px of Verdana, in px; `textLength` makes any other font fit.
_WIDTHS = {
    **dict.fromkeys("ijl.,:;|'!", 3.6),
    **dict.fromkeys("ftrI()[]-/ ", 4.6),
    **dict.fromkeys("mwMW%@", 10.7),
    **dict.fromkeys("ABCDEFGHKNOPQRUVXYZ", 7.9),
}
_OTHER_WIDTH = 6.9


@dataclass(frozen=True)
class Badge:
    """What a badge says. title: in a sentence, for screen readers and as a tooltip."""

    label: str
    message: str
    title: str
    suspicious: bool = False

    @property
    def colour(self) -> str:
        return SUSPICIOUS_COLOUR if self.suspicious else PLAIN_COLOUR


def badge_of(run: Run, model: str | None, attack: str) -> Badge:
    """The accuracy of a classifier under an attack of the run, under "worst-case" (over all), "average" or "clean".

    model: None for the only classifier of the run. `UserError` for unknown names and for a number that there is not.
    """
    chosen = _choose(of_kind(run, "classifier"), model)
    rows = [row for row in leaderboard(run) if row.model == chosen.name and row.kind.accuracy]
    row = _row_of(rows, attack)
    if not row.measured or row.value is None:
        reason = f" ({row.note})" if row.note else ""
        raise UserError(
            f"--attack {attack!r} on {row.model}: {row.status}{reason}; a badge needs a number, "
            f"run the same `robbench run` again or name another attack"
        )
    return _badge(run, row, _suspicious(chosen, row))


def _choose(classifiers: Sequence[ModelResults], model: str | None) -> ModelResults:
    names = [found.name for found in classifiers]
    if not names:
        raise UserError("the run has no classifier, and a badge shows an accuracy; name another run")
    if model is None and len(names) > 1:
        raise UserError(f"the run has {len(names)} classifiers; name one with --model: {', '.join(names)}")
    chosen = names[0] if model is None else known_name("model of the run", model, names)
    return next(found for found in classifiers if found.name == chosen)


def _row_of(rows: Sequence[TableRow], attack: str) -> TableRow:
    shown = [row for row in rows if row.attack != WORST_CASE or row.threat_model == ALL_THREATS]
    found = attack_among(attack, (row.attack for row in shown), "attack of the run")
    return next(row for row in shown if row.attack == found)


def _suspicious(model: ModelResults, row: TableRow) -> bool:
    """Whether something is suspicious about an attack that the number stands on."""
    attacks = row.combined or (row.attack,)
    return any(r.cell.doubts for r in model.cells if r.cell.attack.label in attacks)


def _badge(run: Run, row: TableRow, suspicious: bool) -> Badge:
    interval = ""
    if row.lower is not None and row.upper is not None:
        interval = f", 95 % interval {row.lower:.1f} to {row.upper:.1f}"
    attack = row.attack if row.attack == "clean" else f"{row.attack}{_budget(row)}"
    doubts = ["; the run found something suspicious about it"] if suspicious else []
    doubts += [f"; partial, {partial_note(row)}"] if row.status == "partial" else []
    marks = ["partial"] * (row.status == "partial") + ["suspicious"] * suspicious
    doubts += [f"; {OBLIVIOUS}"] if row.oblivious else []
    marks += ["oblivious attacks only"] if row.oblivious else []
    measure = f"{row.measure or 'accuracy'}{' with rejection' if row.detector else ''}"
    return Badge(
        label=f"{run.dataset} {measure}, {attack}",
        message=f"{row.value:.1f} %" + (f" ({', '.join(marks)})" if marks else ""),
        title=f"{row.model} on {run.dataset}, {attack}: {measure} {row.value:.1f} %{interval}, "
        f"n = {row.n}, seed {row.seed}{''.join(doubts)}",
        suspicious=suspicious,
    )


def _budget(row: TableRow) -> str:
    """ " (epsilon 0.2, eta 0.5)" of an attack whose label does not say it."""
    if "@" in row.attack:
        return ""
    budgets = (("epsilon", row.epsilon), ("eta", row.eta))
    texts = [f"{name} {value:.4g}" for name, value in budgets if value is not None]
    return f" ({', '.join(texts)})" if texts else ""


def badge_svg(badge: Badge) -> str:
    """The badge as an SVG image: the same badge gives the same bytes."""
    left, right = (_width(text) + 2 * PADDING for text in (badge.label, badge.message))
    width, title = left + right, escape(badge.title)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{HEIGHT}" '
        f'viewBox="0 0 {width} {HEIGHT}" role="img" aria-label="{title}">\n'
        f"<title>{title}</title>\n"
        f'<rect width="{width}" height="{HEIGHT}" rx="3" fill="{badge.colour}"/>'
        f'<path d="M{left} 0H3a3 3 0 0 0-3 3v{HEIGHT - 6}a3 3 0 0 0 3 3H{left}z" fill="{LABEL_COLOUR}"/>\n'
        f'<g fill="#ffffff" font-family="{FONT}" font-size="{FONT_SIZE}" aria-hidden="true">\n'
        f"{_text(PADDING, badge.label)}\n{_text(left + PADDING, badge.message)}\n</g>\n</svg>\n"
    )


def _text(x: int, text: str) -> str:
    return f'<text x="{x}" y="14" textLength="{_width(text)}" lengthAdjust="spacingAndGlyphs">{escape(text)}</text>'


def _width(text: str) -> int:
    return round(sum(_WIDTHS.get(character, _OTHER_WIDTH) for character in text))


def badge_json(badge: Badge) -> dict[str, object]:
    """The badge as shields.io's endpoint badge takes it (https://shields.io/badges/endpoint-badge)."""
    return {
        "schemaVersion": 1,
        "label": badge.label,
        "message": badge.message,
        "color": badge.colour.removeprefix("#"),
        "labelColor": LABEL_COLOUR.removeprefix("#"),
    }
