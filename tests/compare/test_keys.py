"""Which rows of two sides correspond, against a search of every pair."""

from itertools import product

import pytest

from robbench.compare.keys import Key, pair_rows


def test_pairing_finds_what_a_search_of_all_pairs_finds() -> None:
    said = product(("m", "n"), (None, "classifier", "flow"), (None, "linf"), (None, "none", 8 / 255, 0.1))
    keys = [Key(model, "a", target, None, None, threat, budget) for model, target, threat, budget in said]
    for key, found in pair_rows(keys, keys, lambda key: key):
        assert found == [
            other
            for other in keys
            if key.model == other.model
            and all(
                None in pair or pair[0] == pair[1]
                for pair in zip(
                    (key.target, key.threat_model, key.epsilon),
                    (other.target, other.threat_model, other.epsilon),
                    strict=True,
                )
            )
        ]


@pytest.mark.parametrize(
    ("budget", "other", "same"),
    [(8 / 255, 0.03137255, True), (8 / 255, 0.0314, False), (0.0, "none", False), ("none", "none", True)],
)
def test_budgets_written_with_seven_digits_are_the_same(budget: float, other: float, same: bool) -> None:
    assert Key("m", "a", epsilon=budget).matches(Key("m", "a", epsilon=other)) is same
    assert Key("m", "a", eta=other).matches(Key("m", "a", eta=budget)) is same
