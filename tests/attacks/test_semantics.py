"""What an attack's images stand for: the worst of a set that holds the clean image, or a perturbation whose own image
counts, and what follows for verdicts, addresses and records."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from robbench.attacks import ATTACKS, Attack, Victim, build_attack
from robbench.core.errors import UserError
from robbench.evaluation import evaluate
from robbench.specs import ResolvedAttack, resolve_attack, threat_models
from robbench.store.ledger import unify_robust

MODELS = threat_models()
PERTURBATIONS = ["r-la", "r-la-l2", "r-la-none", "a-la-pred"]
N = 24


def spec(name: str, **changes: object) -> ResolvedAttack:
    return resolve_attack(name, "digits", MODELS).model_copy(update=changes)


def built(name: str, flow: object) -> Attack:
    return build_attack(spec(name), flow)  # type: ignore[arg-type]


class Scripted(nn.Module):
    """Says what it was told of its images and of everything else near them: `clean` where an image is one of `x` (up to
    1e-4), `moved` where it is not, each [N] classes by the nearest image."""

    def __init__(self, x: Tensor, clean: Tensor, moved: Tensor) -> None:
        super().__init__()
        self.x, self.clean, self.moved = x.flatten(1), clean, moved

    def forward(self, image: Tensor) -> Tensor:
        gap = (image.detach().flatten(1)[:, None] - self.x[None]).abs()
        nearest = gap.square().sum(2).argmin(1)
        stays = gap.amax(2).gather(1, nearest[:, None]).squeeze(1) < 1e-4
        says = torch.where(stays, self.clean[nearest], self.moved[nearest])
        logits = nn.functional.one_hot(says, 10).float() * 4.0
        return logits + 1e-6 * image.mean((1, 2, 3))[:, None]


def outcome_of(attack: Attack, model: nn.Module, x: Tensor, y: Tensor, batch_size: int = 7):
    return attack.evaluate(Victim(model, batch_size=batch_size), torch.arange(len(x)), x, y, 0, batch_size)


@pytest.fixture(scope="module")
def data(digits):
    return digits.test.x(torch.arange(N)), digits.test.labels[torch.arange(N)]


@pytest.mark.parametrize("name", PERTURBATIONS)
def test_a_model_wrong_on_clean_and_right_on_every_perturbed_image(name, data, flow):
    x, y = data
    outcome = outcome_of(built(name, flow), Scripted(x, (y + 1) % 10, y), x, y)
    assert not outcome.robust.any()
    assert outcome.under_attack.all()
    assert (outcome.linf > 1e-4).all()
    assert set(outcome.broken_by) == {"clean"}
    assert outcome.broken_at.tolist() == [0] * N


@pytest.mark.parametrize("name", PERTURBATIONS)
@given(seed=st.integers(0, 2**31))
@settings(max_examples=2)
def test_both_numbers_of_any_mixture_of_verdicts(name, data, flow, seed):
    """Against the script itself: robust is right twice, right under attack is right on the moved image."""
    x, y = data
    generator = torch.Generator().manual_seed(seed)
    wrong = torch.rand((2, N), generator=generator) < 0.5
    clean, moved = ((y + part) % 10 for part in wrong.long())
    outcome = outcome_of(built(name, flow), Scripted(x, clean, moved), x, y)
    assert torch.equal(outcome.robust, ~wrong[0] & ~wrong[1])
    assert torch.equal(outcome.under_attack, ~wrong[1])
    assert torch.equal(outcome.under_attack, outcome.predictions == y)
    assert [by is None for by in outcome.broken_by] == outcome.robust.tolist()


@pytest.mark.parametrize("name", ["pgd20", "fgsm-l2", "a-la", "jsa10", "om-pgd"])
def test_a_worst_case_leaves_misclassified_images_and_both_numbers_agree(name, data, flow):
    x, y = data
    outcome = outcome_of(built(name, flow), Scripted(x, (y + 1) % 10, y), x, y)
    assert torch.equal(outcome.adversarial, x)
    assert not outcome.robust.any()
    assert not outcome.under_attack.any()


def test_every_named_attack_declares_what_its_images_stand_for():
    found = {
        name
        for model in MODELS.values()
        for name, attack in model.attacks.items()
        if model.target == "classifier"
        for algorithm in [ATTACKS.get(attack.algorithm)]
        if algorithm.declared_semantics(algorithm.Parameters.model_validate(attack.parameters))
        == "perturbation"
    }
    corruptions = {*MODELS["corruptions"].attacks, *MODELS["corruptions-generated"].attacks}
    weather = {name for name in MODELS["unforeseen"].attacks if name.split("-")[0] in ("fog", "jpeg", "snow")}
    assert found == {*PERTURBATIONS, *corruptions, *weather}


@pytest.mark.parametrize("parameters", [{"early_stop": True}, {"restarts": 3}])
def test_against_the_prediction_nothing_is_chosen_by_the_true_label(parameters, flow):
    given_spec = spec("pgd20", parameters={"steps": 2, "label_source": "predicted", **parameters})
    with pytest.raises(UserError, match=r"label_source predicted with .*early_stop: false and restarts: 1"):
        build_attack(given_spec)
    left_out = build_attack(spec("pgd20", parameters={"steps": 2, "label_source": "predicted"}))
    assert left_out.spec.parameters["early_stop"] is False
    assert left_out.spec.semantics == "perturbation"


# ---------------------------------------------------------------------------------------------------- addresses
def test_addresses_move_for_perturbations_alone(flow):
    """What is hashed of all other attacks is what was hashed before semantics were declared."""
    for name in ("pgd20", "a-la", "jsa10", "aa", *PERTURBATIONS):
        attack = built(name, flow).spec
        before = attack.model_dump(mode="json", exclude={"label", "of_grid", "given_budget", "semantics"})
        assert (attack.identity == before) == (name not in PERTURBATIONS), name
    fog = spec("c-fog-1")
    assert fog.semantics == "perturbation"
    assert "semantics" not in fog.identity


@pytest.mark.parametrize(
    ("name", "semantics"), [("r-la", "worst-case"), ("pgd20", "worst-case"), ("c-fog-1", "perturbation")]
)
def test_records_of_before_are_read_as_what_they_were(name, semantics):
    old = json.loads(spec(name).model_dump_json(exclude={"of_grid", "given_budget", "semantics"}))
    read = ResolvedAttack.model_validate(old)
    assert read.semantics == semantics
    assert read.identity == {key: value for key, value in old.items() if key != "label"}


def test_robust_of_old_corrupted_images_gets_its_one_meaning():
    import pandas as pd

    old = pd.DataFrame(
        {
            "robust": [True, True, False, False],
            "clean_margin": [1.0, -1.0, 1.0, -1.0],
            "broken_by": pd.Series([None, None, "c-fog-1", "clean"], dtype=object),
            "broken_at": [-1, -1, 0, 0],
        }
    )
    corrupted = spec("c-fog-1")
    new = unify_robust(corrupted, old)
    assert new["robust"].tolist() == [True, False, False, False]
    assert new["broken_by"].fillna("").tolist() == ["", "clean", "c-fog-1", "clean"]
    assert new["broken_at"].tolist() == [-1, 0, 0, 0]
    pd.testing.assert_frame_equal(unify_robust(corrupted, new), new)
    assert unify_robust(spec("pgd20"), old) is old


# ----------------------------------------------------------------------------------------------------- evaluate
@pytest.mark.filterwarnings("ignore::robbench.attacks.trust.suspicions.RobbenchWarning")
def test_evaluate_names_what_it_counts_and_leaves_perturbations_out_of_the_worst_case(data, flow):
    x, y = data
    moved = torch.where(torch.arange(N) < 6, (y + 1) % 10, y)  # a quarter is broken
    clean = torch.where(torch.arange(N) >= 12, (y + 1) % 10, y)  # half is wrong without attack
    model = Scripted(x, clean, moved)
    table = evaluate(model, x, y, ["fgsm", "r-la", "a-la-pred"], dataset="digits", flow=flow, device="cpu")
    rows = table.to_dataframe().set_index("attack")
    assert rows["measure"].to_dict() == {
        "clean": "accuracy",
        "fgsm": "robust accuracy",
        "r-la": "accuracy under attack",
        "a-la-pred": "accuracy under attack",
        "worst-case": "robust accuracy",
    }
    assert rows.loc["r-la", "accuracy"] == 75.0
    assert rows.loc["r-la", "robust_accuracy"] == 25.0
    assert rows.loc["worst-case", "accuracy"] == rows.loc["fgsm", "accuracy"]
    alone = evaluate(model, x, y, ["r-la"], dataset="digits", flow=flow, device="cpu")
    assert alone.worst_case is None
    alone = alone.to_dataframe().set_index("attack")
    assert alone["accuracy"].isna().to_dict() == {"clean": False, "r-la": False, "worst-case": True}
