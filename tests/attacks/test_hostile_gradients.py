"""Models that keep their logits and lie elsewhere: in gradients, in the type of the output, in the scale of a class."""

import hostile_models as hostile
import pytest
import torch
from test_untrusted_models import evaluated
from torch import nn

from robbench.attacks import Victim
from robbench.attacks.trust.agreement import relative_gaps
from robbench.attacks.trust.preflight import check_model
from robbench.core.errors import UserError

HOW = [
    "noise",
    "negative",
    "of another place",
    "of the batch",
    "off the grey levels",
    "detached",
    "asked for",
    "tiny",
]


def kinds(outcome):
    return {one.kind for one in outcome.suspicions}


@pytest.mark.parametrize(
    ("name", "how"),
    [*(("pgd20", how) for how in HOW), ("jsa10", "noise"), ("jsa10", "detached"), ("apgd-ce", "asked for")],
)
def test_gradients_that_are_no_slopes_are_a_suspicion(name, how, classifier, flow, images):
    outcome = evaluated(hostile.WrongGradient(classifier, how), images, name, flow=flow)
    assert "wrong-gradients" in kinds(outcome)


def test_an_attack_without_gradients_does_not_care(classifier, images):
    honest, lying = (
        evaluated(model, images, "square")
        for model in (classifier, hostile.WrongGradient(classifier, "noise"))
    )
    assert torch.equal(honest.robust, lying.robust)
    assert not kinds(lying)


@pytest.mark.parametrize("name", ["fgsm", "pgd20", "pgd20-l2", "apgd-ce", "fab-t", "jsa10"])
def test_slopes_of_an_honest_model_are_its_gradients(name, classifier, flow, images):
    seen = evaluated(classifier, images, name, flow=flow).diagnostics
    assert seen.slopes >= 16
    assert seen.wrong_slopes <= 0.1 * seen.slopes


def test_gradients_in_shared_memory_change_nothing(classifier, images):
    """Of a mean all pixels have one gradient, which autograd gives as one number; a buffer may be used again."""
    plain, held = (
        evaluated(model, images, "apgd-ce") for model in (classifier, hostile.OneGradientBuffer(classifier))
    )
    assert torch.equal(plain.adversarial, held.adversarial)
    mean = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, 10))
    assert 0 <= int(evaluated(mean, images, "apgd-ce").robust.sum()) <= 48


@pytest.mark.parametrize("name", ["pgd20", "jsa10"])
def test_a_tensor_that_compares_as_it_likes_decides_nothing(name, classifier, flow, images):
    plain, lying = (
        evaluated(model, images, name, flow=flow) for model in (classifier, hostile.Lying(classifier))
    )
    assert torch.equal(plain.robust, lying.robust)
    assert torch.equal(plain.adversarial, lying.adversarial)


@pytest.mark.parametrize(
    "out", [torch.Tensor.to_sparse, lambda rows: rows.to("meta")], ids=["sparse", "meta"]
)
def test_outputs_without_dense_data_get_one_line(out, classifier, images):
    class Model(nn.Module):
        def forward(self, x):
            return out(classifier(x))

    with pytest.raises(UserError, match="a tensor without dense data for 32 images"):
        evaluated(Model(), images, "fgsm")


def test_a_class_ruled_out_by_a_huge_logit_hides_no_difference(classifier, images):
    assert check_model(Victim(hostile.Masked(classifier)), images[1]).gap == 0.0
    with pytest.raises(UserError, match="the model is randomised"):
        evaluated(hostile.MaskedNoise(classifier), images, "fgsm")
    with pytest.raises(UserError, match="depend on the other images of its batch"):
        evaluated(hostile.Masked(hostile.BatchCentred(classifier)), images, "fgsm")
    plain, masked = (evaluated(model, images, "pgd20") for model in (classifier, hostile.Masked(classifier)))
    assert torch.equal(plain.robust, masked.robust)


def test_near_ties_are_no_other_logits():
    """Attacked images lie at the boundary, where two logits are almost equal: rounding is small beside clean logits."""
    clean = torch.tensor([[4.0, -4.0]]).repeat(8, 1)
    near = torch.tensor([[1e-4, 0.0]]).repeat(8, 1)
    assert float(relative_gaps(near, near + torch.tensor([4e-5, 0.0]), clean).max()) < 1e-3


def test_attacked_images_are_scored_alone_too(classifier, images):
    with pytest.raises(
        UserError, match="attacked images other logits at the end of an attack, in other batches"
    ):
        evaluated(hostile.RoundsInCompany(classifier), images, "pgd20")


@pytest.mark.parametrize(
    ("leave", "text"),
    [
        (lambda: torch.set_grad_enabled(False), "torch.set_grad_enabled"),
        (lambda: torch.set_default_dtype(torch.float64), "torch.set_default_dtype"),
    ],
)
def test_a_forward_that_leaves_torch_in_another_mode_is_refused(leave, text, classifier, images):
    with pytest.raises(UserError, match=f"leaves torch in another mode than before .{text}"):
        evaluated(hostile.LeavesMode(classifier, leave), images, "pgd20")
    assert torch.is_grad_enabled()
    assert torch.get_default_dtype() == torch.float32


def test_another_number_of_classes_for_some_images_is_refused(classifier, images):
    class Grows(nn.Module):
        def forward(self, x):
            out = classifier(x)
            return torch.cat([out, out[:, :1] - 1], 1) if hostile.off_grey(x.detach()).any() else out

    with pytest.raises(UserError, match="10 logits for some images and 11 for others"):
        evaluated(Grows(), images, "pgd20")
