"""Pre-processing of flows: exact inverse and density of the logit, and the published decoder that is no inverse."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from robbench.core.errors import UserError
from robbench.models.flows import Flow, Glow
from robbench.models.flows.layers import ZeroConv
from robbench.models.flows.preprocessing import build_preprocessing

quick = settings(max_examples=12, derandomize=True)


def lively(
    seed: int = 0, grey_levels: int = 256, shape: tuple[int, int, int] = (1, 4, 4), **how: str
) -> Flow:
    torch.manual_seed(seed)
    how = {"preprocessing": "logit", **how}
    flow = Glow(shape, grey_levels, levels=1, steps=2, width=5, **how)  # type: ignore[arg-type]
    flow.initialize(torch.rand(16, *shape))
    with torch.no_grad():
        for module in flow.modules():
            if isinstance(module, ZeroConv):
                module.conv.weight.normal_(std=0.05)
    return flow.eval()


def images(flow: Flow, n: int = 3) -> tuple[Tensor, Tensor]:
    size = (n, *flow.input_shape)
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(0, flow.grey_levels, size, generator=generator) / (flow.grey_levels - 1)
    return x.double(), torch.rand(size, generator=generator, dtype=torch.float64)


@quick
@given(side=st.integers(1, 4), n=st.integers(1, 4), kind=st.sampled_from(["shift", "logit"]))
def test_inverse_and_log_det(side: int, n: int, kind: str) -> None:
    pre = build_preprocessing(kind)
    d = torch.rand(n, 1, side, side, dtype=torch.float64)
    v = pre.forward(d)
    torch.testing.assert_close(pre.inverse(v), d, rtol=0, atol=1e-14)
    jacobian = torch.autograd.functional.jacobian(lambda pixels: pre.forward(pixels), d)
    square = jacobian.reshape(d.numel(), d.numel())
    torch.testing.assert_close(pre.log_det(v).sum(), torch.linalg.slogdet(square).logabsdet)
    assert pre.log_det(v).shape == (n,)


def test_logit_in_closed_form() -> None:
    """d = 1/2 is p = 1/2, v = 0, dv/dd = .9 / (p (1-p)) = 3.6."""
    pre = build_preprocessing("logit")
    v = pre.forward(torch.full((1, 1, 1, 1), 0.5, dtype=torch.float64))
    assert float(v) == pytest.approx(0.0, abs=1e-15)
    assert float(pre.log_det(v)) == pytest.approx(math.log(3.6))


def test_black_and_white_stay_finite_and_return() -> None:
    flow = lively()
    for value in (0.0, 1.0):
        x = torch.full((2, 1, 4, 4), value)
        for u in (0.0, 0.999):
            assert torch.isfinite(flow.log_prob(x, u=u)).all()
            assert float(flow.roundtrip_error(x, u=u).max()) < 1e-4


@quick
@given(seed=st.integers(0, 50), grey_levels=st.sampled_from([2, 17, 256]))
def test_round_trip_and_log_det_of_a_logit_flow(seed: int, grey_levels: int) -> None:
    flow = lively(seed, grey_levels)
    x, u = images(flow)
    assert float(flow.roundtrip_error(x.float(), u=u.float()).max()) < 1e-4
    flow.double().requires_grad_(False)
    frozen = flow.freeze(torch.float64)
    assert float(flow.roundtrip_error(x, u=u).max()) < 1e-9
    jacobian = torch.autograd.functional.jacobian(lambda image: flow.encode(image, u=u[:1])[0].flat(), x[:1])
    change = flow.dimensions * math.log((grey_levels - 1) / grey_levels)
    expected = torch.linalg.slogdet(jacobian.reshape(flow.dimensions, -1)).logabsdet - change
    for model in (flow, frozen):
        torch.testing.assert_close(model.encode(x[:1], u=u[:1])[1][0], expected, rtol=1e-9, atol=1e-8)
    torch.testing.assert_close(frozen.log_prob(x, u=u), flow.log_prob(x, u=u), rtol=1e-9, atol=1e-9)


def test_the_density_integrates_to_one() -> None:
    """A logit flow covers d in (-.0555, 1.0555): midpoint sum over 13^4 points of 2x2 images."""
    flow = lively(grey_levels=2, shape=(1, 2, 2)).double()
    points = ((torch.arange(13, dtype=torch.float64) + 0.5) / 13 - 0.05) / 0.9
    d = torch.cartesian_prod(points, points, points, points).reshape(-1, 1, 2, 2)
    with torch.no_grad():
        density = flow.log_prob(2.0 * d - 0.5) + 4 * math.log(2.0)  # d = (x + 1/2) / 2
    assert float(density.exp().mean()) / 0.9**4 == pytest.approx(1.0, abs=0.1)


# ------------------------------------------------------------------------------------------ published decoder
@quick
@given(seed=st.integers(0, 50), grey_levels=st.sampled_from([17, 256]), fixed=st.booleans())
def test_flp_legacy_returns_the_squeezed_noisy_pixels(seed: int, grey_levels: int, fixed: bool) -> None:
    flow = lively(seed, grey_levels, decode_mode="flp_legacy").double()
    x, u = images(flow)
    noise = 0.5 if fixed else u
    expected = 0.05 + 0.9 * ((grey_levels - 1) * x + noise) / grey_levels
    for model in (flow, flow.freeze(torch.float64)):
        decoded = model.decode(model.encode(x, u=noise)[0], u=noise)
        torch.testing.assert_close(decoded, expected, rtol=0, atol=1e-9)


def test_flp_legacy_keeps_density_and_exact_copy() -> None:
    exact, legacy = lively(), lively(decode_mode="flp_legacy")
    x, u = (tensor.float() for tensor in images(exact))
    assert torch.equal(exact.log_prob(x, u=u), legacy.log_prob(x, u=u))
    assert float(legacy.roundtrip_error(x, u=u).max()) == pytest.approx(0.05, abs=0.006)
    assert legacy.freeze().decode_mode == "flp_legacy"
    assert float(legacy.freeze(decode_mode="exact").roundtrip_error(x, u=u).max()) < 1e-4
    assert float(exact.freeze(decode_mode="flp_legacy").roundtrip_error(x, u=u).max()) > 0.02


def test_the_default_is_shift_and_exact() -> None:
    flow = Glow((1, 4, 4), 17, levels=1, steps=1, width=2)
    assert (flow.preprocessing.kind, flow.decode_mode) == ("shift", "exact")
    logit = Glow((1, 4, 4), 17, levels=1, steps=1, width=2, preprocessing="logit")
    assert set(flow.state_dict()) == set(logit.state_dict())  # no state of its own: weights stay loadable


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preprocessing": "logits"}, r"preprocessing='logits'; choose one of: shift, logit"),
        ({"decode_mode": "legacy"}, r"decode_mode='legacy'; choose one of: exact, flp_legacy"),
        ({"decode_mode": "flp_legacy", "preprocessing": "shift"}, r"needs preprocessing='logit'"),
    ],
)
def test_impossible_arguments_are_refused(arguments: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        lively(**arguments)  # type: ignore[arg-type]
    if "preprocessing" not in arguments:
        with pytest.raises(UserError, match=message):
            lively().freeze(decode_mode=arguments["decode_mode"])  # type: ignore[arg-type]
