"""Paired tests against brute force and other libraries; intervals against published examples; rank ranges by chance."""

import math
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from robbench.statistics import paired as module
from robbench.statistics.paired import (
    PairedCounts,
    holm,
    mean_difference,
    paired,
    paired_interval,
    rank_ranges,
    sign_test,
)

counts = st.integers(0, 60)
tables = st.tuples(counts, counts, counts, counts).filter(lambda t: sum(t) > 0)


def exact_p(b: int, c: int) -> float:
    """Every outcome of b + c fair coins, in whole numbers."""
    tail = ways = 1
    for i in range(min(b, c)):
        ways = ways * (b + c - i) // (i + 1)
        tail += ways
    return float(min(Fraction(1), Fraction(2 * tail, 2 ** (b + c))))


def of(both: int, only_a: int, only_b: int, neither: int) -> PairedCounts:
    return PairedCounts(both, only_a, only_b, neither, sign_test(only_a, only_b))


# ------------------------------------------------------------------------------------------------------ tests
@given(st.lists(st.tuples(st.integers(0, 400), st.integers(0, 400)), min_size=1, max_size=8))
def test_the_sign_test_counts_outcomes_exactly(pairs: list[tuple[int, int]]) -> None:
    b, c = np.array(pairs).T
    assert sign_test(b, c) == pytest.approx([exact_p(*pair) for pair in pairs], rel=1e-9)
    assert sign_test(int(b[0]), int(c[0])) == sign_test(b, c)[0]


def test_the_sign_test_of_many_pairs_keeps_its_tail() -> None:
    assert sign_test(1_500, 1_800) == pytest.approx(exact_p(1_500, 1_800), rel=1e-9)
    assert sign_test(10, 700) == pytest.approx(exact_p(10, 700), rel=1e-9)
    assert sign_test(0, 0) == 1.0
    with pytest.raises(ValueError, match="negative"):
        sign_test(-1, 3)


def test_tests_agree_with_statsmodels() -> None:
    tables = pytest.importorskip("statsmodels.stats.contingency_tables", reason="pip install statsmodels")
    multiple = pytest.importorskip("statsmodels.stats.multitest", reason="pip install statsmodels")
    for b, c in [(0, 5), (5, 0), (7, 12), (40, 61), (9, 9)]:
        expected = tables.mcnemar([[30, b], [c, 10]], exact=True).pvalue
        assert sign_test(b, c) == pytest.approx(min(1.0, expected), rel=1e-12)
    p = np.random.default_rng(0).random(40) ** 4
    assert holm(p) == pytest.approx(multiple.multipletests(p, method="holm")[1], rel=1e-12)


@given(st.lists(st.floats(0, 1), max_size=12), st.floats(0.001, 0.5))
def test_holm_rejects_what_its_steps_reject(p: list[float], alpha: float) -> None:
    rejected: set[int] = set()
    for step, k in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        if p[k] * (len(p) - step) > alpha:
            break
        rejected.add(k)
    adjusted = holm(p)
    assert set(np.flatnonzero(adjusted <= alpha)) == rejected
    assert (adjusted >= np.asarray(p)).all()


def test_holm_refuses_what_is_no_p() -> None:
    for wrong in ([0.1, math.nan], [1.5], [-0.1], [[0.1]]):
        with pytest.raises(ValueError, match="p-values"):
            holm(wrong)


# ------------------------------------------------------------------------------------------------------ pairs
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=80))
def test_paired_counts_every_sample_once(pairs: list[tuple[bool, bool]]) -> None:
    a, b = np.array(pairs).T
    found = paired(a, b)
    cells = [pairs.count(kind) for kind in ((True, True), (True, False), (False, True), (False, False))]
    assert [found.both, found.only_a, found.only_b, found.neither] == cells
    assert found.p == pytest.approx(exact_p(cells[1], cells[2]), rel=1e-9)
    assert found.difference().value == pytest.approx(100 * (b.mean() - a.mean()), abs=1e-9)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (np.array([True]), np.array([True, False])),
        (np.array([], bool), np.array([], bool)),
        (np.array([1.0]), np.array([True])),
        (np.array([[True]]), np.array([[True]])),
    ],
)
def test_paired_refuses_other_samples(a: np.ndarray, b: np.ndarray) -> None:
    with pytest.raises(ValueError, match="verdicts of"):
        paired(a, b)


def test_intervals_of_published_examples() -> None:
    # Bentur et al. 2009 in Fagerland, Lydersen, Laake, Stat. Med. 33 (2014): -0.507 to -0.026 (square-and-add).
    lower, upper = paired_interval(of(1, 7, 1, 12))
    assert (round(lower / 100, 3), round(upper / 100, 3)) == (-0.507, -0.026)
    # Altman et al., Statistics with Confidence (2000), table 6.2: 0.122, 0.011 to 0.226.
    found = of(14, 0, 5, 22).difference()
    assert [round(v / 100, 3) for v in (found.value, found.lower, found.upper)] == [0.122, 0.011, 0.226]


@given(tables, st.floats(0.5, 0.999))
def test_intervals_hold_their_value_and_turn_with_the_pair(
    table: tuple[int, int, int, int], confidence: float
) -> None:
    both, only_a, only_b, neither = table
    lower, upper = paired_interval(of(*table), confidence)
    value = 100 * (only_b - only_a) / sum(table)
    assert -100 <= lower <= value + 1e-9
    assert value - 1e-9 <= upper <= 100
    turned = paired_interval(of(both, only_b, only_a, neither), confidence)
    assert turned == pytest.approx((-upper, -lower), abs=1e-9)
    wider = paired_interval(of(*table), (1 + confidence) / 2)
    assert wider[0] <= lower + 1e-9
    assert upper - 1e-9 <= wider[1]


@pytest.mark.parametrize(
    "rates", [(0.6, 0.05, 0.05, 0.3), (0.2, 0.02, 0.12, 0.66), (0.9, 0.04, 0.01, 0.05)], ids=str
)
def test_intervals_cover_the_true_difference(rates: tuple[float, ...]) -> None:
    draws, repeats = np.random.default_rng(1).multinomial(120, rates, size=2_000), {}
    true = 100 * (rates[2] - rates[1])
    covered = 0
    for draw in map(tuple, draws.tolist()):
        repeats.setdefault(draw, paired_interval(of(*draw)))
        covered += repeats[draw][0] <= true <= repeats[draw][1]
    assert 0.93 <= covered / len(draws) <= 0.99


def test_mean_difference_is_a_paired_normal_interval() -> None:
    rng = np.random.default_rng(2)
    before = rng.normal(3, 2, 400)
    after = before + rng.normal(0.1, 0.3, 400)
    found = mean_difference(before, after)
    lower, upper = stats.norm.interval(0.95, np.mean(after - before), stats.sem(after - before))
    assert (found.lower, found.upper) == pytest.approx((lower, upper), rel=1e-9)
    assert found.value == pytest.approx(np.mean(after - before), rel=1e-12)


def test_mean_difference_survives_huge_and_missing_values() -> None:
    found = mean_difference([0, 0, 0, math.inf, math.nan], [1e308, 1e308, 1e308, math.inf, 1])
    assert (found.value, found.n, found.n_finite) == (pytest.approx(1e308), 5, 3)
    assert mean_difference([math.nan], [1.0]).value is None
    single = mean_difference([1.0], [3.0])
    assert (single.value, single.lower, single.upper) == (2.0, None, None)


# ------------------------------------------------------------------------------------------------------ ranks
def brute_ranks(table: np.ndarray, alpha: float) -> list[tuple[int, int]]:
    pairs = list(combinations(range(len(table)), 2))
    wins = [(int((table[i] & ~table[j]).sum()), int((table[j] & ~table[i]).sum())) for i, j in pairs]
    p_of = {counts: exact_p(*counts) for counts in set(wins)}
    p = [p_of[counts] for counts in wins]
    better, worse = [0] * len(table), [0] * len(table)
    for (i, j), (b, c), adjusted in zip(pairs, wins, holm(np.minimum(p, 1)), strict=True):
        if adjusted <= alpha:
            winner, loser = (i, j) if b > c else (j, i)
            better[loser] += 1
            worse[winner] += 1
    return [(1 + up, len(table) - down) for up, down in zip(better, worse, strict=True)]


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 150), st.sampled_from([0.01, 0.05, 0.3]))
def test_rank_ranges_are_those_of_every_pair(seed: int, models: int, n: int, alpha: float) -> None:
    rng = np.random.default_rng(seed)
    table = rng.random((models, n)) < rng.random((models, 1))
    expected = brute_ranks(table, alpha) if models > 1 else [(1, 1)]
    assert rank_ranges(table, alpha) == expected
    with pytest.MonkeyPatch.context() as patch:  # several blocks of models
        patch.setattr(module, "BLOCK", 3)
        assert rank_ranges(table, alpha) == expected


def test_clear_models_get_their_rank_and_equal_ones_the_whole_range() -> None:
    table = np.arange(400)[None] < np.array([[100], [300], [200]])
    assert rank_ranges(table) == [(3, 3), (1, 1), (2, 2)]
    assert rank_ranges(np.repeat(table[:1], 4, axis=0)) == [(1, 4)] * 4


def test_equal_models_are_rarely_told_apart() -> None:
    rng, alarms = np.random.default_rng(5), 0
    for _ in range(300):
        hardness = rng.random(150)
        table = rng.random((8, 150)) < hardness  # all pairs of equal accuracy, all verdicts correlated
        alarms += any(found != (1, 8) for found in rank_ranges(table))
    assert alarms / 300 <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 300)


def test_two_hundred_models_are_ranked_as_one_pair_at_a_time_ranks_them() -> None:
    rng = np.random.default_rng(6)
    table = rng.random(1_000) + 0.3 * rng.normal(size=(200, 1_000)) < rng.random((200, 1))
    found = rank_ranges(table)
    assert found == brute_ranks(table, 0.05)
    accuracy = table.mean(1)
    assert found[int(accuracy.argmax())][0] == 1
    assert found[int(accuracy.argmin())][1] == 200


@pytest.mark.parametrize(
    "wrong", [np.zeros((2, 0), bool), np.zeros((2, 3)), np.zeros(3, bool)], ids=["empty", "floats", "flat"]
)
def test_rank_ranges_refuse_what_is_no_table(wrong: np.ndarray) -> None:
    with pytest.raises(ValueError, match="verdicts of"):
        rank_ranges(wrong)
    with pytest.raises(ValueError, match="alpha"):
        rank_ranges(np.zeros((2, 3), bool), alpha=0)
