"""The gated coupling flow: exact inverse and density, frozen copies, and the published MNIST checkpoint."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from robbench.core.errors import UserError
from robbench.data import load_dataset, sample_ids
from robbench.models.flows import GatedCouplingFlow, Latents
from robbench.models.flows.base import Memory
from robbench.models.flows.gated_coupling import ChannelNorm, GatedCoupling
from robbench.models.loading import load_flow
from robbench.models.zoo import zoo_entries
from robbench.statistics.likelihood import importance_weighted_bits_per_dim

quick = settings(max_examples=10, derandomize=True)
ALPHA = 1e-5


def lively(
    shape: tuple[int, int, int] = (1, 4, 6), seed: int = 0, levels: int = 17, **how: object
) -> GatedCouplingFlow:
    """Every parameter away from its start."""
    torch.manual_seed(seed)
    sizes = {"couplings": 4, "width": 5, "blocks": 2, "preprocessing": "shift"} | how
    flow = GatedCouplingFlow(shape, levels, **sizes)  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return flow.eval()


def images(flow: GatedCouplingFlow, n: int = 3) -> tuple[Tensor, Tensor]:
    """(x, u): grey levels in [0,1] and dequantisation noise, float64."""
    generator = torch.Generator().manual_seed(5)
    size = (n, *flow.input_shape)
    x = torch.randint(0, flow.grey_levels, size, generator=generator).double() / (flow.grey_levels - 1)
    return x, torch.rand(size, generator=generator, dtype=torch.float64)


# ------------------------------------------------------------------------------- the published formulas, again
def net(state: dict[str, Tensor], at: str, h: Tensor, blocks: int) -> Tensor:
    def conv(h: Tensor, name: str) -> Tensor:
        weight = state[f"{at}.{name}.weight"]
        return F.conv2d(h, weight, state[f"{at}.{name}.bias"], padding=weight.shape[-1] // 2)

    def concat_elu(h: Tensor) -> Tensor:
        return torch.cat([F.elu(h), F.elu(-h)], dim=1)

    h = conv(h, "0")
    for i in range(1, 2 * blocks, 2):
        out = conv(concat_elu(conv(concat_elu(h), f"{i}.net.1")), f"{i}.net.3")
        half = out.shape[1] // 2
        h = h + out[:, :half] / (1.0 + torch.exp(-out[:, half:]))
        mean, variance = h.mean(1, keepdim=True), h.var(1, unbiased=False, keepdim=True)
        h = (h - mean) / torch.sqrt(variance + 1e-5) * state[f"{at}.{i + 1}.gamma"] + state[
            f"{at}.{i + 1}.beta"
        ]
    return conv(concat_elu(h), str(2 * blocks + 2))


def published_bits_per_dim(
    state: dict[str, Tensor], grey: Tensor, u: Tensor, couplings: int, blocks: int
) -> Tensor:
    """-log2 p of integers 0..255, [N]; state: with the names of the published file."""
    pixels = grey[0].numel()
    p = (grey + u) / 256.0 * (1.0 - ALPHA) + 0.5 * ALPHA
    z = torch.log(p) - torch.log(1.0 - p)
    log_det = pixels * (math.log(1.0 - ALPHA) - math.log(256.0)) - (torch.log(p) + torch.log(1.0 - p)).sum(
        (1, 2, 3)
    )
    for i in range(1, couplings + 1):
        mask = state[f"flows.{i}.mask"]
        raw, t = net(state, f"flows.{i}.network.nn", z * mask, blocks).chunk(2, dim=1)
        factor = torch.exp(state[f"flows.{i}.scaling_factor"])[:, None, None]
        s, t = torch.tanh(raw / factor) * factor * (1.0 - mask), t * (1.0 - mask)
        z = (z + t) * torch.exp(s)
        log_det = log_det + s.sum((1, 2, 3))
    prior = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum((1, 2, 3))
    return -(prior + log_det) / (pixels * math.log(2.0))


def test_density_equals_the_published_formulas() -> None:
    flow = lively((2, 4, 6), levels=256, preprocessing="logit-1e-5").double()
    state = {name.removeprefix("transform."): value for name, value in flow.state_dict().items()}
    x, u = images(flow)
    expected = published_bits_per_dim(state, (x * 255.0).round(), u, couplings=4, blocks=2)
    for model in (flow, flow.freeze(torch.float64)):
        found = -model.log_prob(x, u=u) / (flow.dimensions * math.log(2.0))
        torch.testing.assert_close(found.detach(), expected.detach(), rtol=1e-9, atol=1e-9)


def test_names_and_shapes_of_the_published_file() -> None:
    state = GatedCouplingFlow((1, 28, 28), 256).state_dict()
    block = {
        "net.1.weight": (32, 64, 3, 3),
        "net.1.bias": (32,),
        "net.3.weight": (64, 64, 1, 1),
        "net.3.bias": (64,),
    }
    coupling: dict[str, tuple[int, ...]] = {"scaling_factor": (1,), "mask": (1, 1, 28, 28)}
    coupling |= {"network.nn.0.weight": (32, 1, 3, 3), "network.nn.0.bias": (32,)}
    coupling |= {f"network.nn.{i}.{name}": shape for i in (1, 3, 5) for name, shape in block.items()}
    coupling |= {f"network.nn.{i}.{name}": (1, 32, 1, 1) for i in (2, 4, 6) for name in ("gamma", "beta")}
    coupling |= {"network.nn.8.weight": (2, 64, 3, 3), "network.nn.8.bias": (2,)}
    expected = {f"flows.{i}.{name}": shape for i in range(1, 9) for name, shape in coupling.items()}
    assert len(expected) == 192
    assert {name.removeprefix("transform."): tuple(value.shape) for name, value in state.items()} == expected


def test_published_names_are_loaded_and_others_refused() -> None:
    flow, other = lively(seed=1), lively(seed=2)
    published = {name.removeprefix("transform."): value for name, value in other.state_dict().items()}
    x, u = (tensor.float() for tensor in images(flow))
    assert not torch.equal(flow.log_prob(x, u=u), other.log_prob(x, u=u))
    flow.load_state_dict(published)
    assert torch.equal(flow.log_prob(x, u=u), other.log_prob(x, u=u))
    flow.load_state_dict(other.state_dict())
    del published["flows.1.scaling_factor"]
    with pytest.raises(RuntimeError, match=r"transform\.flows\.1\.scaling_factor"):
        flow.load_state_dict(published)


def test_channel_norm_is_pytorchs_layer_norm_of_every_pixel() -> None:
    norm, oracle = ChannelNorm(6).double(), nn.LayerNorm(6).double()
    with torch.no_grad():
        for weight, its in ((norm.gamma, oracle.weight), (norm.beta, oracle.bias)):
            weight.normal_()
            its.copy_(weight.flatten())
    h = torch.randn(2, 6, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(norm(h), oracle(h.movedim(1, -1)).movedim(-1, 1))


# --------------------------------------------------------------------------------------- inverse and density
@quick
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5)),
    couplings=st.integers(1, 3),
    preprocessing=st.sampled_from(["shift", "logit", "logit-1e-5"]),
    seed=st.integers(0, 50),
)
def test_decode_inverts_encode_with_the_stored_noise(
    shape: tuple[int, int, int], couplings: int, preprocessing: str, seed: int
) -> None:
    flow = lively(shape, seed, couplings=couplings, preprocessing=preprocessing)
    x, u = images(flow)
    for model in (flow, flow.freeze()):
        assert float(model.roundtrip_error(x.float(), u=u.float()).max()) < 1e-3
    flow.double()
    for model in (flow, flow.freeze(torch.float64)):
        assert float(model.roundtrip_error(x, u=u).max()) < 1e-9


@quick
@given(preprocessing=st.sampled_from(["shift", "logit-1e-5"]), seed=st.integers(0, 50))
def test_log_det_is_that_of_the_jacobian(preprocessing: str, seed: int) -> None:
    flow = lively((2, 3, 3), seed, preprocessing=preprocessing).double().requires_grad_(False)
    x, u = images(flow, n=1)
    jacobian = torch.autograd.functional.jacobian(lambda image: flow.encode(image, u=u)[0].flat(), x)
    change = flow.dimensions * math.log((flow.grey_levels - 1) / flow.grey_levels)
    expected = torch.linalg.slogdet(jacobian.reshape(flow.dimensions, -1)).logabsdet - change
    for model in (flow, flow.freeze(torch.float64)):
        torch.testing.assert_close(model.encode(x, u=u)[1][0], expected, rtol=1e-9, atol=1e-8)


def test_a_coupling_changes_one_colour_only() -> None:
    flow, h = lively((1, 3, 4), couplings=2), torch.randn(2, 1, 3, 4)
    odd = (torch.arange(3)[:, None] + torch.arange(4)) % 2 == 1
    for step, changed in zip(flow.transform.flows.values(), (~odd, odd), strict=True):  # type: ignore[union-attr,operator]
        out, _ = step.encode(h, None)
        assert torch.equal((out != h)[:, 0], changed.expand(2, 3, 4))


def test_it_starts_as_its_preprocessing() -> None:
    flow = GatedCouplingFlow((1, 4, 4), 256, couplings=2, width=4, blocks=1)
    x = torch.rand(2, 1, 4, 4)
    d = (255.0 * x + 0.5) / 256.0
    torch.testing.assert_close(flow.encode(x)[0].levels[0], torch.logit(ALPHA / 2 + (1 - ALPHA) * d))
    assert flow.level_shapes == ((1, 4, 4),)


def test_scales_are_bounded_so_that_far_latents_stay_finite() -> None:
    flow = lively(couplings=8)
    for model in (flow, flow.freeze()):
        far = Latents((1e4 * torch.randn(4, *flow.input_shape),))
        decoded = model.decode(far)
        assert torch.isfinite(decoded).all()
        assert torch.isfinite(model.log_prob(decoded)).all()
    for step in flow.transform.flows.values():  # type: ignore[union-attr,operator]
        _, log_det = step.encode(1e6 * torch.randn(4, *flow.input_shape), None)
        bound = float(torch.exp(step.scaling_factor.detach())) * flow.dimensions / 2
        assert float(log_det.detach().abs().max()) <= bound * (1.0 + 1e-6)


# --------------------------------------------------------------------------------------- frozen
@quick
@given(
    memory=st.sampled_from(["none", "mask", "invert"]),
    channels=st.integers(1, 2),
    preprocessing=st.sampled_from(["shift", "logit-1e-5"]),
)
def test_frozen_agrees_with_the_flow(memory: Memory, channels: int, preprocessing: str) -> None:
    flow = lively((channels, 4, 3), preprocessing=preprocessing).double()
    frozen = flow.freeze(torch.float64, memory)
    x, u = images(flow)
    close = {"rtol": 1e-9, "atol": 1e-9}
    latents, log_det = flow.encode(x, u=u)
    torch.testing.assert_close(frozen.encode(x, u=u)[0].flat(), latents.flat(), **close)
    torch.testing.assert_close(frozen.encode(x, u=u)[1], log_det, **close)
    found = []
    for model in (flow, frozen):
        z, image = latents.flat().detach().requires_grad_(), x.clone().requires_grad_()
        decoded = model.decode(Latents.unflat(z, flow.level_shapes), u=u)
        (gradient,) = torch.autograd.grad(decoded.square().sum(), z)
        (slope,) = torch.autograd.grad(model.log_prob(image, u=u).sum(), image)
        found.append((decoded.detach(), gradient, slope))
    torch.testing.assert_close(found[0], found[1], **close)


def test_frozen_is_an_independent_copy_without_parameters() -> None:
    flow = lively()
    x, frozen = torch.rand(2, *flow.input_shape), flow.freeze()
    before = frozen.log_prob(x)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.1)
    assert torch.equal(frozen.log_prob(x), before)
    assert list(frozen.parameters()) == []
    assert not before.requires_grad
    assert all(isinstance(parameter, nn.Parameter) for parameter in flow.parameters())


def test_memory_modes_keep_less_for_the_backward_pass() -> None:
    flow, kept = lively((1, 8, 8), width=12, blocks=3), {}
    for memory in ("none", "mask", "invert"):
        frozen, sizes = flow.freeze(memory=memory), {}  # type: ignore[arg-type,var-annotated]
        weights = {tensor.untyped_storage().data_ptr() for tensor in frozen.buffers()}

        def record(tensor: Tensor, sizes: dict[int, int] = sizes, weights: set[int] = weights) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        z = torch.randn(8, frozen.dimensions, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
            decoded = frozen.decode(Latents.unflat(z, frozen.level_shapes))
        decoded.sum().backward()
        kept[memory] = sum(sizes.values())
    assert kept["mask"] < 0.2 * kept["none"]
    assert kept["invert"] < 0.5 * kept["mask"]


def test_it_learns() -> None:
    torch.manual_seed(0)
    flow = GatedCouplingFlow((1, 4, 4), 17, couplings=2, width=8, blocks=1, preprocessing="shift")
    x = torch.linspace(0.2, 0.8, 64)[:, None, None, None].expand(64, 1, 4, 4)
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)
    score = lambda: float(flow.bits_per_dim(x, seed=0, sample_ids=range(64)).detach().mean())  # noqa: E731
    before = score()
    for _ in range(40):
        optimizer.zero_grad()
        (-flow.log_prob(x, u=torch.rand_like(x)).mean() / 16).backward()
        optimizer.step()
    assert score() < before - 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"couplings": 0}, "couplings=0"),
        ({"width": 0}, "width=0"),
        ({"blocks": 0}, "blocks=0"),
        ({"preprocessing": "logit-2"}, "choose one of: shift, logit, logit-1e-5"),
        ({"decode_mode": "flp_legacy"}, "needs preprocessing='logit'"),
    ],
)
def test_impossible_flows_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        GatedCouplingFlow((1, 4, 4), 17, **change)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------ the published file
@pytest.fixture(scope="module")
def checkpoint(shared: Path) -> Path:
    folder = shared / "checkpoints"
    if not (folder / "mnist-flow").is_dir():
        pytest.skip("../shared/checkpoints with downloaded weights is absent")
    return folder


def test_the_published_flow(shared: Path, checkpoint: Path) -> None:
    """Its density is that of the file through plain functions; its bits/dim are near the published 1.078."""
    entry = zoo_entries(checkpoints=checkpoint)["mnist-flow"]
    flow = load_flow(entry)
    test = load_dataset("mnist", shared / "data").test
    ids = sample_ids(test, 16, seed=0)
    x, _ = test.by_ids(ids)
    content = torch.load(checkpoint / entry.card.weights.file, map_location="cpu", weights_only=True)
    u = torch.rand(2, *flow.input_shape, generator=torch.Generator().manual_seed(0))
    expected = published_bits_per_dim(content["state_dict"], x[:2] * 255.0, u, couplings=8, blocks=3)
    found = -flow.log_prob(x[:2], u=u) / (784 * math.log(2.0))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
    assert float(flow.roundtrip_error(x[:2]).max()) < 1e-4

    one = flow.bits_per_dim(x, seed=0, sample_ids=ids)
    weighted = importance_weighted_bits_per_dim(flow, x, 2, seed=0, sample_ids=ids)
    spread = float(one.std()) / len(ids) ** 0.5
    assert float(weighted.mean()) < float(one.mean()) + 0.01
    assert float(one.mean()) == pytest.approx(1.09, abs=4.0 * spread)
    published = {m.metric: m.value for m in entry.card.measurements if m.note.startswith("published")}
    assert published["bits/dim, 8 importance samples"] == pytest.approx(
        content["result"]["test"][0]["test_bpd"], abs=1e-4
    )


def test_its_coupling_is_a_step_that_undoes_itself() -> None:
    step = next(iter(lively().transform.flows.values()))  # type: ignore[union-attr,operator]
    assert isinstance(step, GatedCoupling)
    h = torch.randn(2, 1, 4, 6)
    torch.testing.assert_close(step.decode(step.encode(h, None)[0], None), h)
