"""AutoAttack's rows name the parity table of the engine that made them."""

import io

import pytest
from publish_runs import make_run
from rich.console import Console

from robbench.core.resources import data_root
from robbench.core.schema import load_yaml
from robbench.report.site.build import run_page
from robbench.report.writers import markdown, terminal_table
from robbench.results import parity
from robbench.results.tables import leaderboard
from robbench.store.records import CellResult, Run


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parity tables of version 7, measured with engine 5 alone."""
    tables = parity.ParityTables(version=7, engines=("robbench engine 5",))
    monkeypatch.setattr(parity, "_load_tables", lambda: tables)


def of_engine(run: Run, engine: str) -> Run:
    cells = [CellResult(r.cell.model_copy(update={"engine": engine}), r.rows) for r in run.cells]
    return make_run(cells, run.n)


@pytest.mark.usefixtures("measured")
@pytest.mark.parametrize(
    ("engine", "said"),
    [
        ("robbench engine 5", "robbench aa, parity table v7"),
        ("robbench engine 6", "robbench aa, robbench engine 6: no parity table (v7 is of robbench engine 5)"),
    ],
)
def test_every_form_of_a_report_names_it(run: Run, engine: str, said: str) -> None:
    one = of_engine(run, engine)
    rows = leaderboard(one)
    assert {row.note for row in rows if row.attack == "aa" and row.metric == "accuracy"} == {said}
    assert not any("parity" in row.note for row in rows if row.attack == "pgd20")
    console = Console(width=400, record=True, file=io.StringIO())
    console.print(terminal_table(one))
    for text in (markdown(one, rows), run_page(one), console.export_text()):
        assert f"aa: {said}." in " ".join(text.split())  # a caption is wrapped


def test_the_load_tables_file_names_this_engine() -> None:
    from robbench.attacks.named import ENGINE_VERSION

    shipped = load_yaml(data_root() / "reports" / "autoattack" / "parity.yaml", parity.ParityTables)
    assert f"robbench engine {ENGINE_VERSION}" in shipped.engines
