"""Other budgets and steps of attacks that a group has: curves on its models' pages, and a group of their own."""

from dataclasses import replace

from publish_runs import attack, cell, frame, make_run

from robbench.report.site import compare_page, model_page
from robbench.report.site.boards import boards
from robbench.report.site.build import parts
from robbench.report.site.groups import site_of
from robbench.report.site.page import Page
from robbench.report.site.tables import ABOUT, RANK

N = 40
MODELS = ("digits-a", "digits-b")


def run_of(*labels_and_budgets: tuple[str, float]):  # type: ignore[no-untyped-def]
    cells = [
        cell(name, attack(label, "linf", epsilon), frame(N, 0.95, 0.6 - epsilon, 10 * k + j))
        for k, name in enumerate(MODELS)
        for j, (label, epsilon) in enumerate(labels_and_budgets)
    ]
    return make_run(cells, N)


def labels(run) -> set[str]:  # type: ignore[no-untyped-def]
    return {result.cell.attack.label for result in run.cells}


def test_sweeps_of_a_groups_attacks_leave_its_tables() -> None:
    plain = run_of(("pgd20", 0.2), ("mim", 0.2))
    swept = run_of(("pgd20@0.1", 0.1), ("pgd20@0.3", 0.3), ("fgsm@0.3", 0.3))
    main, sweep = site_of([plain, swept]).groups
    assert labels(main.run) == {"pgd20", "mim", "fgsm@0.3"}  # of fgsm there is nothing else
    assert labels(sweep.run) == {"pgd20@0.1", "pgd20@0.3"}
    assert sweep.is_sweep
    assert main.sweep_path == sweep.board_path()
    columns = {column.label for board in boards(main) for table in board.tables for column in table.columns}
    assert not any("pgd20@" in label for label in columns)
    alone = site_of([plain]).groups[0]
    average = {(r.model, r.value) for r in alone.rows if r.attack == "average"}
    without = replace(main.run, cells=[r for r in main.run.cells if r.cell.attack.label != "fgsm@0.3"])
    assert {(r.model, r.value) for r in site_of([without]).groups[0].rows if r.attack == "average"} == average


def test_the_curves_of_a_model_take_its_sweeps() -> None:
    plain, swept = run_of(("pgd20", 0.2)), run_of(("pgd20@0.1", 0.1), ("pgd20@0.3", 0.3))
    site = site_of([plain, swept])
    main = site.groups[0]
    page = next(
        p for p in model_page.parts(site) if isinstance(p, Page) and p.path == main.model_path(MODELS[0])
    )
    assert "at 0.1, " in page.body
    assert "at 0.2, " in page.body
    assert f'href="site:{main.sweep_path}"' in page.body
    assert [r.cell.model_name for r in main.swept(MODELS[0])] == [MODELS[0]] * 2


def test_a_run_of_given_budgets_alone_is_an_ordinary_group() -> None:
    (group,) = site_of([run_of(("pgd20@0.1", 0.1), ("pgd20@0.3", 0.3))]).groups
    assert not group.is_sweep
    assert group.sweep_path == ""


def test_models_are_not_compared_with_their_own_sweeps() -> None:
    site = site_of([run_of(("pgd20", 0.2)), run_of(("pgd20@0.1", 0.1))])
    pages = [page for page in compare_page.parts(site) if isinstance(page, Page)]
    assert pages[0].path == site.groups[0].compare_path
    assert MODELS[0] in pages[0].body
    assert "other budgets" not in pages[0].body  # a name that another group has comes with that group's title


def test_an_attack_that_only_some_models_ran_as_defined_costs_the_others_no_rank() -> None:
    plain = run_of(("pgd20", 0.2))
    more = [cell("digits-c", attack("pgd20@0.1", "linf", 0.1), frame(N, 0.95, 0.5, 9))]
    main, sweep = site_of([plain, make_run(more, N)]).groups
    assert labels(main.run) == {"pgd20"}
    assert [r.cell.model_name for r in sweep.run.cells] == ["digits-c"]
    keys = [column.key for column in boards(main)[0].tables[0].columns]
    ranks = [line[keys.index(RANK)].kind for line in boards(main)[0].tables[0].lines]
    assert ranks == ["rank", "rank"]


def test_nothing_is_combined_over_several_budgets_and_steps() -> None:
    site = site_of(
        [run_of(("pgd20", 0.2)), run_of(("pgd20@0.1", 0.1), ("pgd20@0.3", 0.3), ("pgd20@5steps", 0.2))]
    )
    sweep = site.groups[1]
    table = boards(sweep)[-1].tables[0]
    assert [column.key for column in table.columns if column.part != ABOUT] == [
        "model", "clean", "defense", "pgd20@0.1", "pgd20@0.3", "pgd20@5steps"
    ]  # fmt: skip
    assert table.scatter is None
    of_one_budget = next(board for board in boards(sweep) if board.title == "linf, ε = 0.3")
    assert [column.key for column in of_one_budget.tables[0].columns][1:4] == [RANK, "clean", "worst case"]
    bodies = {page.path: page.body for page in parts(site) if isinstance(page, Page)}
    text = bodies[sweep.model_path(MODELS[0])]
    assert "worst case over all attacks" not in text
    assert "average of clean" not in text
    assert "worst case over all attacks" in bodies[site.groups[0].model_path(MODELS[0])]
    compared = bodies[sweep.compare_path]
    assert '"columns":["worst linf, ε = 0.1","worst linf, ε = 0.3","worst linf, ε = 0.2","clean"' in compared
