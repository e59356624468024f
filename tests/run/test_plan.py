"""What identifies a cell, and how a request becomes cells."""

from pathlib import Path

import pytest

from robbench.cards import Architecture
from robbench.core.errors import UserError
from robbench.models.zoo import read_entry
from robbench.run.plan import SHARD_SIZE, build_plan
from robbench.run.request import RunRequest
from robbench.specs import resolve_attack, threat_models
from robbench.store.records import cell_hash


def labels(request: RunRequest) -> list[str]:
    return [cell.record.attack.label for cell in build_plan(request).cells]


def test_every_part_of_the_address_matters(tiny_zoo: Path) -> None:
    cards = [read_entry(tiny_zoo / name).card for name in ("tiny-a", "tiny-b")]
    attacks = [
        resolve_attack("pgd20", "digits", threat_models()),
        resolve_attack("pgd50", "digits", threat_models()),
        resolve_attack("pgd20", "digits", threat_models(), epsilon=0.1),
    ]
    flow = cards[1]
    scaled = flow.model_copy(
        update={"architecture": Architecture(name="glow", arguments={"scale_floor": 0.0})}
    )
    base = (cards[0], attacks[0], None, None, "engine 1", None, "digits", "d" * 64, 0)
    changes = [
        (0, cards[1]), (0, cards[0].model_copy(update={"architecture": scaled.architecture})), (1, attacks[1]),
        (1, attacks[2]), (2, flow), (2, scaled), (3, flow), (3, scaled), (4, "engine 2"), (5, 120),
        (6, "mnist"), (7, "e" * 64), (8, 1),
    ]  # fmt: skip
    hashes = [cell_hash(*base)]
    for position, value in changes:
        parts = list(base)
        parts[position] = value
        hashes.append(cell_hash(*parts))
    assert len(set(hashes)) == len(hashes)


def test_names_of_attack_flow_and_model_in_tables_do_not_matter(tiny_zoo: Path) -> None:
    """A renamed model or `--epsilon 0.2` spelled out is the same computation: its results are found again."""
    card = read_entry(tiny_zoo / "tiny-a").card
    attack = resolve_attack("pgd20", "digits", threat_models())
    spelled = resolve_attack("pgd20", "digits", threat_models(), epsilon=attack.epsilon)
    assert spelled.label != attack.label
    other = card.model_copy(update={"name": "other", "defense": "other", "description": "other"})
    flow = read_entry(tiny_zoo / "tiny-b").card
    renamed = flow.model_copy(update={"name": "g"})
    first = cell_hash(card, attack, flow, flow, "engine 1", None, "digits", "d" * 64, 0)
    assert first == cell_hash(other, spelled, renamed, renamed, "engine 1", None, "digits", "d" * 64, 0)


def test_one_cell_an_epsilon_and_none_twice(tiny_zoo: Path) -> None:
    request = RunRequest(
        attacks=("pgd20", "fgsm"),
        models=("tiny-a",),
        defenses=("tiny",),
        zoo=tiny_zoo,
        epsilons=(0.1, 0.2),
        n=5,
    )
    assert labels(request) == 2 * ["pgd20@0.1", "fgsm@0.1", "pgd20@0.2", "fgsm@0.2"]


def test_blocks_extend_when_n_grows(tiny_zoo: Path) -> None:
    small, large = (
        build_plan(RunRequest(attacks=("fgsm",), models=("tiny-a",), zoo=tiny_zoo, n=n)) for n in (150, 300)
    )
    assert [len(ids) for _, ids in small.blocks()] == [SHARD_SIZE, 30]
    assert [len(ids) for _, ids in large.blocks()] == [SHARD_SIZE, SHARD_SIZE, 60]
    assert large.samples[:150] == small.samples
    assert len(set(large.samples)) == 300


def test_samples_are_drawn_by_seed(tiny_zoo: Path) -> None:
    plans = [
        build_plan(RunRequest(attacks=("fgsm",), models=("tiny-a",), zoo=tiny_zoo, n=50, seed=seed))
        for seed in (0, 0, 1)
    ]
    assert plans[0].samples == plans[1].samples != plans[2].samples


def test_all_of_digits_by_default(tiny_zoo: Path) -> None:
    plan = build_plan(RunRequest(attacks=("fgsm",), models=("tiny-a",), zoo=tiny_zoo))
    assert plan.run.n == len(plan.samples) == 360
    assert plan.run.sample_ids == list(plan.samples)


def test_a_model_folder_by_path(tiny_zoo: Path) -> None:
    plan = build_plan(RunRequest(attacks=("fgsm",), models=(str(tiny_zoo / "tiny-a"),), n=5))
    assert [cell.record.model for cell in plan.cells] == ["tiny-a"]


def test_cost_is_the_attack_s(tiny_zoo: Path) -> None:
    plan = build_plan(RunRequest(attacks=("fgsm", "pgd20"), models=("tiny-a",), zoo=tiny_zoo, n=5))
    assert [(cell.cost.forwards, cell.cost.backwards) for cell in plan.cells] == [(3, 1), (22, 20)]


def test_nothing_to_attack() -> None:
    with pytest.raises(UserError, match="--defense or --model"):
        build_plan(RunRequest(attacks=("pgd20",)))
