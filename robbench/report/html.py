"""The leaderboard as one HTML file that needs no network: tables, gallery and cards of a run."""

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from robbench.cards import ModelCard
from robbench.core.resources import write_text_atomically
from robbench.metrics.accuracy import NEAR_TIE
from robbench.report.attack_lines import AttackLine, attack_lines, nll_flows
from robbench.report.data_card import data_card
from robbench.report.flow_page import NO_SHOTS, flow_section, nll_parts
from robbench.report.gallery import Originals, Triple, triples
from robbench.report.templating import environment
from robbench.results import corruptions, wording
from robbench.results.likelihood import caption
from robbench.results.perturbation import Distances, distances
from robbench.results.reproduce import commands
from robbench.results.rows import ModelResults, TableRow, models, rows_of
from robbench.results.tables import leaderboard, wide
from robbench.store.records import Run

NO_ORIGINALS = (
    "No images: the ledger stores adversarial images only, and this page was written without the clean "
    "images of the data set. Write the report again where the data set is at hand."
)
NO_EXAMPLES = "No images: the run stored no adversarial examples of this model."


@dataclass(frozen=True)
class ModelSection:
    """Everything the page says about one classifier. nll_flows: flows that scored its images; scores: names of
    its Fréchet distances."""

    anchor: str
    name: str
    defense: str
    card: ModelCard | None
    lines: tuple[AttackLine, ...]
    nll_flows: tuple[str, ...]
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
    rows, scored = leaderboard(run), distances(run)
    found = models(run)
    script = environment().get_template("page.js.j2").render()
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            run=run,
            table=wide(rows),
            parts=nll_parts(run),
            nll_caption=caption(run),
            no_shots=NO_SHOTS,
            sections=[
                _section(run, number, model, rows, originals, scored)
                if model.kind == "classifier"
                else flow_section(run, number, model, scored)
                for number, model in enumerate(found, 1)
            ],
            anchors={model.name: f"model-{number}" for number, model in enumerate(found, 1)},
            summary=wording.summary(run),
            versions=wording.versions(run),
            intervals=" ".join(filter(None, [wording.measures(rows), wording.INTERVALS])),
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
    shown = triples(run, model.cells, originals) if originals is not None else []
    lines, footnotes = attack_lines(run, model.cells, rows, scored)
    return ModelSection(
        anchor=f"model-{number}",
        name=model.name,
        defense=model.first.cell.defense,
        card=run.cards.get(model.name),
        lines=lines,
        nll_flows=nll_flows(model.cells),
        triples=tuple(shown),
        why_no_triples=NO_ORIGINALS if originals is None else NO_EXAMPLES,
        scores=scored.columns,
        footnotes=footnotes,
    )
