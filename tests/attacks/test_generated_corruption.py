"""Generated corruptions as attacks: names, addresses, verdicts, images that they do not take."""

import re
from typing import get_args

import pytest
import torch
from torch import Tensor, nn

from robbench.attacks import Victim, build_attack
from robbench.core.errors import UserError
from robbench.data.corruption_generators import generated_images
from robbench.data.corruption_names import Headline
from robbench.specs import ResolvedAttack, expand_groups, resolve_attack, threat_models

MODELS = threat_models()
X = torch.rand(5, 3, 9, 8, generator=torch.Generator().manual_seed(2))
IDS, Y = torch.tensor([3, 11, 0, 7, 5]), torch.tensor([0, 1, 2, 0, 1])


class Brightest(nn.Module):
    """Says which channel is brightest."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


def spec(name: str) -> ResolvedAttack:
    return resolve_attack(name, "cifar10", MODELS)


def test_the_group_is_the_fifteen_at_five_severities() -> None:
    names = expand_groups(["corruptions-generated"], MODELS)
    assert names == [f"g-{name}-{severity}" for name in get_args(Headline) for severity in range(1, 6)]
    for name in names:
        corruption, _, severity = name.removeprefix("g-").rpartition("-")
        assert spec(name).parameters == {"corruption": corruption, "severity": int(severity)}
        built = build_attack(spec(name)).spec
        assert (built.semantics, built.parameters["generator"]) == ("perturbation", 1), "part of the address"


def test_every_image_is_corrupted_and_its_own_verdict_counts() -> None:
    attack = build_attack(spec("g-gaussian_noise-5"))
    outcome = attack.evaluate(Victim(Brightest()), IDS, X, Y, 4, 2)
    expected = generated_images("gaussian_noise", 5, X, IDS, 4)
    assert torch.equal(outcome.adversarial, expected)
    assert torch.equal(outcome.under_attack, expected.mean((2, 3)).argmax(1) == Y)
    assert outcome.forwards.tolist() == [attack.cost.forwards] * 5
    whole = attack.evaluate(Victim(Brightest()), IDS, X, Y, 4, 256)
    assert torch.equal(whole.adversarial, expected)


@pytest.mark.parametrize("shape", [(2, 8, 8), (4, 32, 32), (3, 7, 32), (1, 32, 4)])
def test_images_that_it_does_not_take(shape: tuple[int, int, int]) -> None:
    x = torch.zeros(1, *shape)
    said = re.escape(f"these are {' x '.join(map(str, shape))}")
    with pytest.raises(UserError, match=f"attack 'g-fog-3' corrupts grey and RGB images.*{said}") as caught:
        build_attack(spec("g-fog-3")).evaluate(
            Victim(Brightest()), torch.tensor([0]), x, torch.tensor([0]), 0, 1
        )
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "wrong", [{"corruption": "saturate"}, {"severity": 6}, {"severity": 0}, {"generator": 2}]
)
def test_parameters_that_do_not_exist(wrong: dict[str, object]) -> None:
    changed = spec("g-fog-3")
    changed = changed.model_copy(update={"parameters": {**changed.parameters, **wrong}})
    with pytest.raises(UserError, match=f"attack 'g-fog-3', parameters.*{next(iter(wrong))}"):
        build_attack(changed)
