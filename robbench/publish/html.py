"""The leaderboard as one HTML file that needs no network: tables, gallery and cards of a run."""

import base64
import hashlib
import json
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np

from robbench.matrix.records import CellResult, Run
from robbench.publish import wording
from robbench.publish.gallery import Originals, Triple, triples
from robbench.publish.tables import (
    NEAR_TIE,
    ModelResults,
    TableRow,
    cell_status,
    leaderboard,
    models,
    wide,
)
from robbench.resources import write_text_atomically
from robbench.specs import ModelCard, ResolvedAttack

NO_ORIGINALS = (
    "No images: the ledger stores adversarial images only, and this page was written without the clean "
    "images of the data set. Write the report again where the data set is at hand."
)
NO_EXAMPLES = "No images: the run stored no adversarial examples of this model."


@dataclass(frozen=True)
class AttackLine:
    """One attack on one model, as its section's table shows it. `numbers`: texts by column key."""

    attack: ResolvedAttack
    budget: str
    accuracy: TableRow
    attacked: int
    broken: int
    components: str
    numbers: Mapping[str, "Number"]


@dataclass(frozen=True)
class Number:
    """A table cell: what to show and what to sort by (empty when there is nothing)."""

    text: str
    order: str = ""


@dataclass(frozen=True)
class ModelSection:
    """Everything the page says about one model."""

    anchor: str
    name: str
    defense: str
    card: ModelCard | None
    lines: tuple[AttackLine, ...]
    has_likelihood: bool
    triples: tuple[Triple, ...]
    why_no_triples: str


def write_html(run: Run, path: Path, originals: Originals | None = None) -> None:
    """Write the page atomically. originals: clean images [n,C,H,W] in [0,1] by sample ids; without it the
    page has no gallery and says why."""
    write_text_atomically(path, render(run, originals))


def render(run: Run, originals: Originals | None = None) -> str:
    """The page as text."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("robbench.publish"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    rows = leaderboard(run)
    script = environment.get_template("page.js.j2").render()
    return environment.get_template("report.html.j2").render(
        run=run,
        table=wide(rows),
        sections=[
            _section(run, number, model, rows, originals) for number, model in enumerate(models(run), 1)
        ],
        summary=wording.summary(run),
        versions=wording.versions(run),
        intervals=wording.INTERVALS,
        problems=wording.problems(rows),
        flows=_flows(run),
        commands=commands(run),
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
def commands(run: Run) -> list[str]:
    """`robbench run` lines that compute the run's cells again: one for every set of budgets given by hand."""
    groups: dict[tuple[str, ...], dict[str, None]] = {}
    for result in run.cells:
        attack = result.cell.attack
        groups.setdefault(_overrides(attack), {})[attack.name] = None
    names = ",".join(dict.fromkeys(result.cell.model for result in run.cells))
    fixed = ["robbench", "run", "--dataset", run.dataset, "--model", names]
    sample = ["--n", str(run.n), "--seed", str(run.seed)]
    return [
        shlex.join([*fixed, "--attacks", ",".join(attacks), *sample, *overrides])
        for overrides, attacks in groups.items()
    ]


def _overrides(attack: ResolvedAttack) -> tuple[str, ...]:
    """The budget options that the label says were given by hand ("pgd20@0.1", "jsa50@0.2@eta0.3")."""
    marks = attack.label.removeprefix(attack.name).split("@")[1:]
    options: list[str] = []
    for mark in marks:
        options += ["--eta", mark.removeprefix("eta")] if mark.startswith("eta") else ["--epsilon", mark]
    return tuple(options)


def _flows(run: Run) -> list[str]:
    """Names and hashes of the flows used, for attacks and for bits per dimension."""
    used = [flow for r in run.cells for flow in (r.cell.attack_flow, r.cell.nll_flow) if flow]
    return list(dict.fromkeys(f"{flow.name} (sha256 {flow.sha256[:12]})" for flow in used))


# --------------------------------------------------------------------------------------------------- sections
def _section(
    run: Run, number: int, model: ModelResults, rows: Sequence[TableRow], originals: Originals | None
) -> ModelSection:
    mine = {(row.attack, row.metric): row for row in rows if row.model == model.name}
    shown = triples(run, model.cells, originals) if originals is not None else []
    return ModelSection(
        anchor=f"model-{number}",
        name=model.name,
        defense=model.first.cell.defense,
        card=run.cards.get(model.name),
        lines=tuple(_line(run, result, mine) for result in model.cells),
        has_likelihood=any(result.cell.nll_flow for result in model.cells),
        triples=tuple(shown),
        why_no_triples=NO_ORIGINALS if originals is None else NO_EXAMPLES,
    )


def _line(run: Run, result: CellResult, mine: Mapping[tuple[str, str], TableRow]) -> AttackLine:
    attack, rows = result.cell.attack, result.rows
    attacked = rows[rows["clean_prediction"] == rows["label"]]
    broken = attacked[~attacked["robust"].astype(bool)]
    parts = Counter(str(name) for name in broken["broken_by"])
    return AttackLine(
        attack=attack,
        budget=budget_text(attack),
        accuracy=mine[attack.label, "accuracy"],
        attacked=len(attacked),
        broken=len(broken),
        components=", ".join(f"{name} {count}" for name, count in sorted(parts.items(), key=_most_first)),
        numbers=_numbers(run, result, mine),
    )


def _most_first(item: tuple[str, int]) -> tuple[int, str]:
    return -item[1], item[0]


def _numbers(run: Run, result: CellResult, mine: Mapping[tuple[str, str], TableRow]) -> dict[str, Number]:
    label, rows = result.cell.attack.label, result.rows
    numbers = {
        metric: _number(mine.get((label, metric)))
        for metric in ("bits_per_dim_before", "bits_per_dim_after", "l2", "linf")
    }
    for metric in ("l2", "linf"):
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
