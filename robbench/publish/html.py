"""The leaderboard as one HTML file that needs no network: tables, gallery and cards of a run."""

import base64
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np

from robbench.cards import ModelCard
from robbench.matrix.records import CellResult, Run
from robbench.publish import corruptions, wording
from robbench.publish.data_card import data_card
from robbench.publish.flow_page import NO_SHOTS, Number, flow_section, nll_parts, score_number
from robbench.publish.gallery import Originals, Triple, triples
from robbench.publish.likelihood import caption
from robbench.publish.perturbation import Distances, Footnotes, distances
from robbench.publish.reproduce import commands
from robbench.publish.rows import ModelResults, TableRow, attacked, broken, cell_status, models, rows_of
from robbench.publish.tables import NEAR_TIE, leaderboard, wide
from robbench.resources import write_text_atomically
from robbench.specs import ResolvedAttack

NO_ORIGINALS = (
    "No images: the ledger stores adversarial images only, and this page was written without the clean "
    "images of the data set. Write the report again where the data set is at hand."
)
NO_EXAMPLES = "No images: the run stored no adversarial examples of this model."
DISTANCES = ("l2", "linf", "l2_all", "linf_all")


@dataclass(frozen=True)
class AttackLine:
    """One attack on one model, as its section's table shows it. `numbers`: texts by column key."""

    attack: ResolvedAttack
    budget: str
    accuracy: TableRow
    attacked: int
    broken: int
    components: str
    numbers: Mapping[str, Number]


@dataclass(frozen=True)
class ModelSection:
    """Everything the page says about one classifier. scores: names of its Fréchet distances."""

    anchor: str
    name: str
    defense: str
    card: ModelCard | None
    lines: tuple[AttackLine, ...]
    has_likelihood: bool
    triples: tuple[Triple, ...]
    why_no_triples: str
    scores: tuple[str, ...]
    footnotes: tuple[str, ...]
    kind: str = "classifier"


def write_html(run: Run, path: Path, originals: Originals | None = None, published: str = "") -> None:
    """Write the page atomically. originals: clean images [n,C,H,W] in [0,1] by sample ids; without it the
    page has no gallery and says why. published: relative address of the pages of published tables, if there are any."""
    write_text_atomically(path, render(run, originals, published))


def render(run: Run, originals: Originals | None = None, published: str = "") -> str:
    """The page as text."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("robbench.publish"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    rows, scored = leaderboard(run), distances(run)
    script = environment.get_template("page.js.j2").render()
    return environment.get_template("report.html.j2").render(
        run=run,
        table=wide(rows),
        parts=nll_parts(run),
        nll_caption=caption(run),
        no_shots=NO_SHOTS,
        sections=[
            _section(run, number, model, rows, originals, scored)
            if model.kind == "classifier"
            else flow_section(run, number, model, scored)
            for number, model in enumerate(models(run), 1)
        ],
        summary=wording.summary(run),
        versions=wording.versions(run),
        intervals=wording.INTERVALS,
        problems=wording.problems(rows_of(run, rows, "classifier")),
        flows=_flows(run),
        commands=commands(run),
        published=published,
        data_card=data_card(run.data) if run.data else None,
        corruptions=corruptions.corruption_tables(run),
        corruption_header=corruptions.HEADER,
        corruption_caption=corruptions.CAPTION,
        near_tie=NEAR_TIE,
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        bundle=_bundle(),
        bundle_css=(files("itables") / "html" / "dt_bundle.css").read_text(encoding="utf-8"),
    )


def _bundle() -> str:
    """The DataTables bundle of `itables` as a JSON string that cannot end its script element."""
    source = (files("itables") / "html" / "dt_bundle.js").read_text(encoding="utf-8")
    return json.dumps(source, ensure_ascii=False).replace("<", "\\u003c")


# ----------------------------------------------------------------------------------------------------- header
def _flows(run: Run) -> list[str]:
    """Names and hashes of the flows used, for attacks and for bits per dimension."""
    used = [flow for r in run.cells for flow in (r.cell.attack_flow, r.cell.nll_flow) if flow]
    return list(dict.fromkeys(f"{flow.name} (sha256 {flow.sha256[:12]})" for flow in used))


# --------------------------------------------------------------------------------------------------- sections
def _section(
    run: Run,
    number: int,
    model: ModelResults,
    rows: Sequence[TableRow],
    originals: Originals | None,
    scored: Distances,
) -> ModelSection:
    mine = {(row.attack, row.metric): row for row in rows if row.model == model.name}
    shown = triples(run, model.cells, originals) if originals is not None else []
    notes = Footnotes()
    scores = {
        result.cell.hash: dict(
            zip(scored.columns, notes.texts(scored.of_cell(result.cell.hash)), strict=True)
        )
        for result in model.cells
    }
    return ModelSection(
        anchor=f"model-{number}",
        name=model.name,
        defense=model.first.cell.defense,
        card=run.cards.get(model.name),
        lines=tuple(_line(run, result, mine, scores[result.cell.hash]) for result in model.cells),
        has_likelihood=any(result.cell.nll_flow for result in model.cells),
        triples=tuple(shown),
        why_no_triples=NO_ORIGINALS if originals is None else NO_EXAMPLES,
        scores=scored.columns,
        footnotes=(*scored.floor, *notes.lines),
    )


def _line(
    run: Run, result: CellResult, mine: Mapping[tuple[str, str], TableRow], scores: Mapping[str, str]
) -> AttackLine:
    attack, lost = result.cell.attack, broken(result.rows)
    parts = Counter(str(name) for name in lost["broken_by"])
    return AttackLine(
        attack=attack,
        budget=budget_text(attack),
        accuracy=mine[attack.label, "accuracy"],
        attacked=len(attacked(result.rows)),
        broken=len(lost),
        components=", ".join(f"{name} {count}" for name, count in sorted(parts.items(), key=_most_first)),
        numbers={
            **_numbers(run, result, mine),
            **{name: score_number(text) for name, text in scores.items()},
        },
    )


def _most_first(item: tuple[str, int]) -> tuple[int, str]:
    return -item[1], item[0]


def _numbers(run: Run, result: CellResult, mine: Mapping[tuple[str, str], TableRow]) -> dict[str, Number]:
    label, rows = result.cell.attack.label, result.rows
    numbers = {
        metric: _number(mine.get((label, metric)))
        for metric in ("bits_per_dim_before", "bits_per_dim_after", *DISTANCES)
    }
    for metric in DISTANCES:
        numbers[metric] = _plus_minus(numbers[metric], mine.get((label, f"{metric}_std")))
    if cell_status(run, result)[0] != "ok":
        return numbers | {key: Number("-") for key in ("forwards", "backwards", "seconds", "ties")}
    about = "" if bool(rows["counts_exact"].all()) else "≈ "
    for key in ("forwards", "backwards"):
        mean = float(rows[key].mean())
        numbers[key] = Number(f"{about}{mean:.1f}", repr(mean))
    ties = int((rows["margin"].abs() < NEAR_TIE).sum())
    seconds = result.cell.seconds
    return numbers | {
        "seconds": Number(f"{seconds:.1f}", repr(seconds)),
        "ties": Number(str(ties), str(ties)),
    }


def _number(row: TableRow | None) -> Number:
    finite = row is not None and row.value is not None and bool(np.isfinite(row.value))
    return Number(wording.number_text(row), repr(row.value) if row is not None and finite else "")


def _plus_minus(number: Number, spread: TableRow | None) -> Number:
    if spread is None or spread.value is None:
        return number
    return Number(f"{number.text} ± {spread.value:.3f}", number.order)


def budget_text(attack: ResolvedAttack) -> str:
    """ "ε = 8/255", "ε = 0.2, η = 0.35"; "none" for an attack without a budget."""
    parts = [
        f"{symbol} = {_radius(value)}"
        for symbol, value in (("ε", attack.epsilon), ("η", attack.eta))
        if value is not None
    ]
    return ", ".join(parts) or "none"


def _radius(value: float) -> str:
    """A radius as papers print it: k/255 when it is one, else a short decimal."""
    levels = value * 255
    whole = round(levels)
    if 0 < whole < 64 and abs(levels - whole) < 1e-6 and len(f"{value:g}") > 5:
        return f"{whole}/255"
    return f"{value:g}"
