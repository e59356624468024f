"""KeyedNumbers: a hash of key and counter, against splitmix64 in Python integers, and as random numbers."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from robbench.core.random import KeyedNumbers, derive_seed

WORD = 2**64


def finalised(z: int) -> int:
    """The output function of splitmix64 (Steele, Lea, Flood 2014, figure 17) on unsigned 64-bit integers."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % WORD
    return z ^ (z >> 31)


def expected_bits(key: int, counter: int, place: int) -> int:
    """State key + position * golden gamma, hashed twice; as int64."""
    position = counter * 2**20 + place
    word = finalised(finalised((key + position * 0x9E3779B97F4A7C15) % WORD))
    return word - WORD if word >= WORD // 2 else word


def test_the_oracle_is_splitmix64():
    # First outputs for seed 1234567 of the reference implementation in C (Vigna, prng.di.unimi.it).
    outputs = [finalised((1234567 + i * 0x9E3779B97F4A7C15) % WORD) for i in (1, 2, 3)]
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@given(
    seed=st.integers(0, 2**31),
    ids=st.lists(st.integers(0, 10**9), min_size=1, max_size=4, unique=True),
    counter=st.integers(0, 2**40),
    count=st.integers(0, 5),
)
@settings(max_examples=60)
def test_bits_are_the_hash_of_key_and_position(seed: int, ids: list[int], counter: int, count: int):
    keys = KeyedNumbers(seed, "stream", ids, restart=2).keys
    assert keys.tolist() == [derive_seed(seed, "stream", 2, i) for i in ids]
    counters = counter + torch.arange(len(ids))
    bits = KeyedNumbers.bits(keys, counters, count)
    assert bits.dtype == torch.int64
    assert bits.shape == (len(ids), count)
    for row, key in enumerate(keys.tolist()):
        assert bits[row].tolist() == [expected_bits(key, counter + row, place) for place in range(count)]
    uniform = KeyedNumbers.uniform(keys, counters, count)
    assert uniform.dtype == torch.float32
    assert torch.equal(uniform, (bits >> 40 & 0xFFFFFF).float() / 2**24)


@given(ids=st.lists(st.integers(0, 10**6), min_size=2, max_size=8, unique=True), data=st.data())
@settings(max_examples=30)
def test_order_and_company_of_samples_do_not_matter(ids: list[int], data: st.DataObject):
    order = data.draw(st.permutations(range(len(ids))))
    counters = torch.arange(len(ids)) * 7
    together = KeyedNumbers.uniform(KeyedNumbers(3, "a", ids).keys, counters, 6)
    shuffled = KeyedNumbers(3, "a", torch.tensor([ids[i] for i in order])).keys
    assert torch.equal(KeyedNumbers.uniform(shuffled, counters[order], 6), together[order])
    alone = KeyedNumbers.uniform(KeyedNumbers(3, "a", ids[:1]).keys, counters[:1], 6)
    assert torch.equal(alone[0], together[0])
    fewer = KeyedNumbers.uniform(KeyedNumbers(3, "a", ids).keys, counters, 4)
    assert torch.equal(fewer, together[:, :4])


def numbers(
    seed: int = 0, stream: str = "a", restart: int = 0, first: int = 0, counter: int = 0
) -> np.ndarray:
    keys = KeyedNumbers(seed, stream, range(first, first + 64), restart).keys
    return KeyedNumbers.uniform(keys, torch.full((64,), counter), 1024).numpy()


def test_uniform_on_the_unit_interval_in_every_way_of_reading_them():
    ids, counters = torch.arange(512), torch.arange(256)
    keys = KeyedNumbers(0, "uniform", ids).keys
    one_draw = numbers().ravel()
    over_counters = KeyedNumbers.uniform(keys[:1].expand(65536), torch.arange(65536), 1).numpy().ravel()
    over_both = KeyedNumbers.uniform(keys.repeat(256), counters.repeat_interleave(512), 1).numpy().ravel()
    for values in (one_draw, over_counters, over_both):
        assert values.min() >= 0.0
        assert values.max() < 1.0
        observed = np.bincount((values * 128).astype(int), minlength=128)
        assert stats.chisquare(observed).pvalue > 1e-4
        assert stats.kstest(values.astype(float), "uniform").pvalue > 1e-4


def test_every_bit_is_a_fair_coin_and_independent_of_every_other():
    bits = KeyedNumbers.bits(KeyedNumbers(1, "bits", range(256)).keys, torch.arange(256), 256).flatten()
    coins = (bits[:, None] >> torch.arange(64) & 1).numpy().astype(float)
    n = len(coins)
    assert np.abs(coins.mean(0) - 0.5).max() < 5 / (2 * n**0.5)
    correlation = np.corrcoef(coins.T) - np.eye(64)
    assert np.abs(correlation).max() < 5.5 / n**0.5


OTHERS = {
    "sample": {"first": 64},
    "counter": {"counter": 1},
    "far counter": {"counter": 2**30},
    "stream": {"stream": "b"},
    "restart": {"restart": 1},
    "seed": {"seed": 1},
}


@pytest.mark.parametrize("what", OTHERS)
def test_each_part_of_the_key_gives_independent_numbers(what: str):
    base, other = numbers().ravel(), numbers(**OTHERS[what]).ravel()
    assert np.isin(base.view(np.uint32), other.view(np.uint32)).mean() < 0.02  # by chance: 65536 / 2**24
    for moved in (other, np.roll(other, 1), np.roll(other, 1024)):
        assert abs(np.corrcoef(base, moved)[0, 1]) < 5 / len(base) ** 0.5
    pairs = np.histogram2d(base, other, bins=16, range=[[0, 1], [0, 1]])[0].ravel()
    assert stats.chisquare(pairs).pvalue > 1e-4


def test_neighbouring_samples_and_successive_draws_are_uncorrelated():
    values = numbers()
    bound = 5 / values.size**0.5
    for a, b in (
        (values[:-1], values[1:]),
        (values[:, :-1], values[:, 1:]),
        (values[:-1, :-1], values[1:, 1:]),
    ):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < bound


def test_successive_counters_do_not_overlap():
    keys = KeyedNumbers(0, "overlap", range(4)).keys
    rows = torch.cat([KeyedNumbers.bits(keys, torch.full((4,), c), 500) for c in range(40)]).flatten()
    assert len(rows.unique()) == len(rows)


@pytest.mark.parametrize("count", [-1, 2**20 + 1])
def test_a_draw_too_large_for_its_counter_is_refused(count: int):
    keys = KeyedNumbers(0, "a", [1]).keys
    with pytest.raises(ValueError, match="numbers a draw"):
        KeyedNumbers.bits(keys, torch.zeros(1, dtype=torch.int64), count)
