"""What stands beside the numbers of a model: parameters as counted, published facts, cards of older runs completed."""

import csv

import pytest
from publish_runs import attack, card, cell, frame, make_run

from robbench.cards import Paper
from robbench.core.resources import data_root
from robbench.models.zoo import zoo_entries
from robbench.report.facts import complete, read_published_models
from robbench.report.site.boards import boards
from robbench.report.site.groups import site_of


@pytest.mark.parametrize("name", ["digits-at", "fashionmnist-at", "trades-mnist", "resnet20-cifar10"])
def test_the_parameters_of_shipped_cards_are_those_of_their_networks(name: str) -> None:
    from robbench.models.loading import build_architecture

    shipped = zoo_entries()[name].card
    module = build_architecture(
        shipped.architecture, shipped.input_shape, shipped.classes, shipped.grey_levels
    )
    assert shipped.parameters == sum(value.numel() for value in module.parameters())


def test_every_shipped_card_says_parameters_and_source() -> None:
    for name, entry in zoo_entries().items():
        assert entry.card.parameters, name
        assert entry.card.source, name


def test_a_card_of_an_older_run_is_completed_by_function_and_keeps_what_it_says() -> None:
    shipped = zoo_entries()["trades-mnist"].card
    old = shipped.model_copy(
        update={"parameters": None, "paper": None, "source": "mine", "description": "old"}
    )
    found = complete(old)
    assert found is not None
    assert (found.parameters, found.paper) == (shipped.parameters, shipped.paper)
    assert (found.source, found.description) == ("mine", "old")
    other = old.model_copy(update={"weights": old.weights.model_copy(update={"sha256": "0" * 64})})
    assert complete(other) == other, "other weights under the same name"
    assert complete(None) is None


def test_every_row_of_robustbench_has_its_facts() -> None:
    rows = csv.DictReader((data_root() / "reports/published/robustbench.csv").read_text().splitlines())
    assert {row["model"] for row in rows} == set(read_published_models())


def test_columns_are_there_where_any_card_says_something() -> None:
    run = make_run([cell(name, attack(), frame(40, 0.9, 0.5, k)) for k, name in enumerate("ab")], 40)
    paper = Paper(title="A paper", venue="ICML", year=2020, url="https://example.org/x")
    run.cards["a"] = card("a", "at").model_copy(update={"parameters": 1_234_567, "paper": paper})
    table = boards(site_of([run]).groups[0])[0].tables[0]
    keys = [column.key for column in table.columns]
    assert {"architecture", "parameters", "paper", "venue", "year"} <= set(keys)
    assert "extra data" not in keys
    line = next(line for line in table.lines if line[0].text == "a")
    assert line[keys.index("parameters")].text == "1.23 M"
    assert line[keys.index("paper")].url == "https://example.org/x"
