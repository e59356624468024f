"""Finite differences against autograd: the closed form of a linear model, and gradients that are wrong."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from robbench.models.gradient import check_gradient


@given(seed=st.integers(0, 2**31 - 1), scale=st.sampled_from([0.01, 1.0, 30.0]))
@settings(max_examples=15)
def test_differences_are_the_closed_form_of_a_linear_model(seed, scale):
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(12, 5).requires_grad_(False)
    linear.weight.copy_(scale * torch.randn(5, 12, generator=generator))
    module = nn.Sequential(nn.Flatten(), linear).double()
    image = torch.rand(1, 3, 2, 2, generator=generator)
    check = check_gradient(module, image, torch.float64)
    logits = module(image.double())[0]
    other = torch.zeros(5).double()
    other[logits.topk(2).indices[1]] = 1.0
    exact = ((logits.softmax(0) - other) @ linear.weight).view(3, 2, 2)
    expected = torch.stack([exact[place] for place in check.coordinates])
    torch.testing.assert_close(check.differences, expected, rtol=1e-4, atol=check.allowed)
    assert len(set(check.coordinates)) == 6
    assert not check.wrong


class Distorted(nn.Module):
    """Softplus units whose gradient is multiplied by `factor`; the outputs are right."""

    def __init__(self, factor):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Softplus(), nn.Linear(8, 5))
        self.factor = factor

    def forward(self, x):
        return self.layers(self.factor * x + (1 - self.factor) * x.detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("factor", [0.0, 0.8, 1.2, -1.0, 30.0])
def test_a_distorted_gradient_is_found_in_both_precisions(dtype, factor):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module, image = Distorted(factor).to(dtype), torch.rand(1, 3, 2, 2)
    check = check_gradient(module, image, dtype)
    assert check.wrong
    torch.testing.assert_close(
        check.autograd, factor * check.differences, rtol=2e-2, atol=1e-3 * max(1, abs(factor))
    )
    module.factor = 1.0
    assert not check_gradient(module, image, dtype).wrong


def test_values_that_are_not_finite_are_wrong():
    class Broken(nn.Module):
        def forward(self, x):
            return torch.stack([x.sum((1, 2, 3)), (x * 0).sqrt().sum((1, 2, 3))], 1)

    assert len(check_gradient(Broken(), torch.rand(1, 3, 2, 2), torch.float64).wrong) == 6
