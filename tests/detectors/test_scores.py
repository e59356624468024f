"""Scores of detectors against scikit-learn, closed forms, brute force and finite differences."""

import copy
import math
from collections import OrderedDict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.covariance import EmpiricalCovariance
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.neighbors import KernelDensity
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler, StandardScaler
from torch import nn

from robbench.core.errors import UserError
from robbench.detectors import DETECTORS, Detector, Reference
from robbench.detectors.attacked import noise_deviation
from robbench.detectors.density import FACTORS, choose_bandwidth, log_density
from robbench.detectors.features import computing_layers, last_hidden_layer, read_layers
from robbench.detectors.lid import LARGEST, intrinsic_dimension
from robbench.detectors.loading import build_detector

SETTINGS = {
    "kde": {"reference": 200, "bandwidth": 1.5},
    "er": {"reference": 200, "sigma": 2.0},
    "lid": {"reference": 150, "k": 10},
    "mahalanobis": {"reference": 400, "shrinkage": 0.1},
}


@pytest.fixture(scope="module")
def exact(classifier):
    """The digits CNN in float64."""
    return copy.deepcopy(classifier).double()


@pytest.fixture(scope="module")
def data(digits):
    """400 training images and their labels as a reference, 60 others, and these with noise."""
    rows = torch.arange(460)
    x, y = digits.train.x(rows), digits.train.labels[rows]
    noise = 0.3 * torch.randn(60, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return x[:400], y[:400], x[400:], (x[400:] + noise).clamp(0, 1)


def fitted(name: str, model: nn.Module, data, layers=(), **changes) -> Detector:
    """A detector that knows 400 images and takes noisy images for adversarial ones."""
    x, y, clean, noisy = data
    chosen = tuple(layers) or (("8",) if name.startswith("er") else ())
    detector = build_detector(
        name, model, chosen, SETTINGS[name[:2] if name[:2] == "er" else name] | changes, clean[:2]
    )
    size = detector.parameters.reference
    detector.learn(Reference(x[:size], y[:size], 10, "digits"))
    detector.fit_scores(
        detector.evidence_of(clean), detector.evidence_of(noisy, clean), detector.evidence_of(clean)
    )
    return detector


@pytest.fixture(scope="module", params=SETTINGS)
def detector(request, exact, data) -> Detector:
    return fitted(request.param, exact, data)


@settings(max_examples=25)
@given(st.integers(1, 6), st.integers(1, 30), st.floats(0.01, 20), st.integers(0, 2**20))
def test_log_density_is_scikit_learns(size: int, n: int, width: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(n, size, generator=generator, dtype=torch.float64)
    z = 3 * torch.randn(8, size, generator=generator, dtype=torch.float64)
    expected = KernelDensity(bandwidth=width).fit(points.numpy()).score_samples(z.numpy())
    assert np.allclose(log_density(z, points, width).numpy(), expected, rtol=1e-9, atol=1e-6)


def test_log_density_of_one_kernel_is_the_normal_density_and_has_a_gradient_where_the_density_is_0() -> None:
    z, point = (
        torch.tensor([[40.0, 0.0]], dtype=torch.float64, requires_grad=True),
        torch.zeros(1, 2).double(),
    )
    value = log_density(z, point, 0.5)
    assert math.exp(value.item()) == 0
    assert value.item() == pytest.approx(-(40**2) / (2 * 0.25) - math.log(2 * math.pi * 0.25))
    value.sum().backward()
    assert z.grad[0].tolist() == pytest.approx([-160.0, 0.0])
    at = point.clone().requires_grad_(True)
    log_density(at, point, 0.5).sum().backward()
    assert at.grad.tolist() == [[0.0, 0.0]]


def test_bandwidth_has_the_largest_cross_validated_likelihood() -> None:
    points = torch.randn(40, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    widths = points.var(0).mean().sqrt().item() * FACTORS
    search = GridSearchCV(KernelDensity(), {"bandwidth": widths}, cv=5).fit(points.numpy())
    assert choose_bandwidth(points) == pytest.approx(search.best_params_["bandwidth"])
    assert widths[0] < choose_bandwidth(points) < widths[-1]


def test_kde_scores_under_the_predicted_class(exact, data) -> None:
    detector, (x, y, _, noisy) = fitted("kde", exact, data), data
    (features,), logits = read_layers(exact, ["8"], torch.cat([x[:200], noisy]).double())
    known, seen, predicted = features[:200].numpy(), features[200:].numpy(), logits[200:].argmax(1)
    expected = [
        KernelDensity(bandwidth=1.5).fit(known[y[:200].numpy() == t]).score_samples(row[None])[0]
        for row, t in zip(seen, predicted.tolist(), strict=True)
    ]
    assert np.allclose(-detector.evidence_of(noisy)[:, 0].numpy(), expected, rtol=0, atol=1e-6)
    # the labels of the images play no part, and a class has its own bandwidth
    widths = detector.held("bandwidths_0").clone()
    chosen = fitted("kde", exact, data, bandwidth="cv").held("bandwidths_0")
    assert widths.tolist() == [1.5] * 10
    assert chosen[3].item() == pytest.approx(choose_bandwidth(torch.from_numpy(known[y[:200].numpy() == 3])))


def test_sigma_of_er_is_its_kernels(exact, data) -> None:
    """exp(-|z|^2 / sigma^2) is a Gaussian kernel of bandwidth sigma / sqrt(2)."""
    assert fitted("er", exact, data).held("bandwidths_0")[0].item() == pytest.approx(2 / math.sqrt(2))
    assert fitted("er2", exact, data, sigma=1.0).held("bandwidths_0")[0].item() == pytest.approx(
        1 / math.sqrt(2)
    )
    assert fitted("er1", exact, data, sigma="cv").held("bandwidths_0").unique().numel() > 1


def test_published_bandwidths(exact, data) -> None:
    x, y, clean, _ = data
    detector = build_detector("kde", exact, (), {"bandwidth": "published"}, clean[:2])
    detector.learn(Reference(x, y, 10, "cifar10"))
    assert detector.held("bandwidths_0").tolist() == [0.26] * 10
    with pytest.raises(UserError, match="none for 'digits'; give a number, or cv"):
        detector.learn(Reference(x, y, 10, "digits"))


def test_intrinsic_dimension_in_closed_form_and_by_brute_force() -> None:
    line = torch.arange(1, 31, dtype=torch.float64)[:, None]
    origin = torch.zeros(1, 1, dtype=torch.float64)
    expected = -20 / sum(math.log(i / 20) for i in range(1, 21))
    assert intrinsic_dimension(origin, line, 20).item() == pytest.approx(expected)
    # sliced from index 1: distances 2..21
    sliced = -20 / sum(math.log(i / 21) for i in range(2, 22))
    assert intrinsic_dimension(origin, line, 20, skipped=1).item() == pytest.approx(sliced)
    generator = torch.Generator().manual_seed(2)
    z, points = (torch.randn(n, 5, generator=generator, dtype=torch.float64) for n in (7, 40))
    distances = np.sort(np.linalg.norm(z.numpy()[:, None] - points.numpy()[None], axis=2), axis=1)[:, :10]
    brute = -10 / np.log(distances / distances[:, -1:]).sum(1)
    assert np.allclose(intrinsic_dimension(z, points, 10).numpy(), brute, rtol=1e-12)


def test_intrinsic_dimension_of_a_ball_is_near_its_dimension() -> None:
    generator = torch.Generator().manual_seed(3)
    points = torch.rand(4000, 3, generator=generator, dtype=torch.float64)
    middle = 0.4 + 0.2 * torch.rand(200, 3, generator=generator, dtype=torch.float64)
    embedded = torch.nn.functional.pad(points, (0, 4)), torch.nn.functional.pad(middle, (0, 4))
    assert intrinsic_dimension(embedded[1], embedded[0], 20).mean().item() == pytest.approx(3, abs=0.4)


def test_intrinsic_dimension_is_finite_where_distances_are_0_or_equal() -> None:
    points = torch.zeros(5, 2, dtype=torch.float64)
    for at in ([0.0, 0.0], [1.0, 0.0]):
        z = torch.tensor([at], dtype=torch.float64, requires_grad=True)
        value = intrinsic_dimension(z, points, 4)
        value.sum().backward()
        assert 0 < value.item() <= LARGEST
        assert bool(z.grad.isfinite().all())


def test_mahalanobis_is_scikit_learns(exact, data) -> None:
    detector, (x, y, _, noisy) = fitted("mahalanobis", exact, data, shrinkage=0.0, layers=("9",)), data
    (features,), _ = read_layers(exact, ["9"], torch.cat([x, noisy]).double(), "mean")
    known, seen = features[:400].numpy(), features[400:].numpy()
    means = np.stack([known[y.numpy() == c].mean(0) for c in range(10)])
    covariance = EmpiricalCovariance(assume_centered=True).fit(known - means[y.numpy()])
    expected = np.min([covariance.mahalanobis(seen - mean) for mean in means], axis=0)
    assert np.allclose(detector.evidence_of(noisy)[:, 0].numpy(), expected, rtol=1e-8, atol=1e-6)


def test_score_is_scikit_learns_decision_function(detector, data) -> None:
    _, _, clean, noisy = data
    negatives, positives = detector.evidence_of(clean).numpy(), detector.evidence_of(noisy).numpy()
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    pipeline.fit(np.concatenate([negatives, positives]), [0] * 60 + [1] * 60)
    scores = detector.scores_of(noisy)
    assert scores.dtype == torch.float64
    assert np.allclose(scores.numpy(), pipeline.decision_function(positives), rtol=0, atol=1e-6)
    assert scores.mean() > detector.scores_of(clean).mean()


def test_a_score_is_of_one_image_alone(detector, data) -> None:
    noisy = data[3].double()
    assert detector.pointwise
    together = detector.scores(noisy)
    alone = torch.cat([detector.scores(image[None]) for image in noisy[:5]])
    assert torch.allclose(together[:5], alone, rtol=0, atol=1e-9)
    assert torch.allclose(detector.scores(noisy.flip(0)), together.flip(0), rtol=0, atol=1e-9)


def test_gradients_are_those_of_finite_differences(detector, data) -> None:
    image, along = (
        data[3][:3].double(),
        torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(4)).double(),
    )
    point = image.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(detector.scores(point).sum(), point)
    slope, step = (gradient * along).flatten(1).sum(1), 1e-6
    with torch.no_grad():
        measured = (detector.scores(image + step * along) - detector.scores(image - step * along)) / (
            2 * step
        )
    assert bool((slope != 0).all())
    assert torch.allclose(slope, measured, rtol=1e-4, atol=1e-6)


def test_quirks_of_lid_are_the_public_codes(exact, data) -> None:
    """Minibatches of clean images, sorted distances from index 1, a scaler that saw everything."""
    detector, (_, _, clean, noisy) = (
        fitted("lid", exact, data, quirks=True, k=5, minibatch=20, layers=("8",)),
        data,
    )
    assert not detector.pointwise
    (before,), _ = read_layers(exact, ["8"], clean.double())
    (after,), _ = read_layers(exact, ["8"], noisy.double())

    def mle(changed: np.ndarray, batch: np.ndarray) -> list[float]:
        rows = np.linalg.norm(changed[:, None] - batch[None], axis=2)
        return [-5 / np.log(v / v[-1]).sum() for v in np.sort(rows, axis=1)[:, 1:6]]

    for images, own in ((clean, before.numpy()), (noisy, after.numpy())):
        expected = [mle(own[at : at + 20], before.numpy()[at : at + 20]) for at in (0, 20, 40)]
        found = detector.evidence_of(images, clean)[:, 0].numpy()
        assert np.allclose(found, np.concatenate(expected), rtol=1e-9)
    seen = torch.cat([detector.evidence_of(clean), detector.evidence_of(noisy, clean)]).numpy()
    scaler = MinMaxScaler().fit(seen)
    assert detector.held("center").numpy() == pytest.approx(scaler.data_min_)
    assert detector.held("scale").numpy() == pytest.approx(scaler.data_range_)
    with pytest.raises(UserError, match=r"a minibatch of 5 has fewer than the k = 5 neighbours"):
        detector.scores(clean[:5])


@settings(max_examples=50)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=60), st.floats(0.001, 0.9))
def test_threshold_flags_at_most_the_stated_share_of_clean_images(values: list[int], rate: float) -> None:
    detector = DETECTORS.get("kde")("kde", nn.Linear(1, 2), ("",), {})
    scores = torch.tensor(values, dtype=torch.float64)
    flagged = detector.fix_threshold(scores, rate)
    assert flagged <= rate + 1e-9
    assert flagged == float((scores > detector.threshold).double().mean())
    lower = scores[scores < scores[~detector.flags(scores)].max()]  # a smaller threshold flags more than that
    assert not len(lower) or float((scores > lower.max()).double().mean()) > rate - 1e-9


def test_a_score_that_is_no_number_is_accepted() -> None:
    detector = DETECTORS.get("kde")("kde", nn.Linear(1, 2), ("",), {})
    detector.threshold = 0.0
    assert detector.flags(torch.tensor([float("nan"), 1.0, 0.0])).tolist() == [False, True, False]


def test_noise_has_the_mean_norm_of_the_attack(data) -> None:
    clean = data[2]
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(5))
    deviation = noise_deviation(clean, noise, 1.3)
    moved = (clean + deviation * noise).clamp(0, 1) - clean
    assert moved.flatten(1).norm(dim=1).mean().item() == pytest.approx(1.3, rel=1e-5)
    assert deviation * 8 > 1.3  # clipping takes some of it
    with pytest.raises(UserError, match="farther than Gaussian noise takes them"):
        noise_deviation(clean, noise, 7.9)


class Reused(nn.Module):
    """A network whose ReLU runs twice, once in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.last = nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.act(self.act(self.first(x.flatten(1))) - 0.1))


def test_layers(exact, data) -> None:
    images = data[2][:3].double()
    assert last_hidden_layer(exact, images) == "9:input"
    (into, out), logits = read_layers(exact, ["9:input", "8"], images)
    assert torch.equal(into, out)
    assert torch.equal(exact[9](out), logits)
    (maps,), _ = read_layers(exact, ["0"], images, "mean")
    assert torch.allclose(maps, exact[0](images).mean((2, 3)))
    assert computing_layers(exact, images) == ("0", "1", "2", "3", "4", "5", "7", "8", "9")
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in exact.modules())
    model, x = Reused(), torch.randn(5, 1, 2, 2, generator=torch.Generator().manual_seed(6))
    (first,), _ = read_layers(model, ["first"], x)  # before the ReLU in place
    assert torch.equal(first.float(), model.first(x.flatten(1)))
    assert computing_layers(model, x) == ("first", "last")
    for layer, problem in (
        ("act", "runs 2 times a forward"),
        ("frist", "did you mean 'first'"),
        ("", "unknown layer"),
    ):
        with pytest.raises(UserError, match=problem):
            build_detector("kde", model, (layer,), {}, x)
    with pytest.raises(UserError, match="names a layer twice"):
        build_detector("kde", model, ("first", "first"), {}, x)
    with pytest.raises(UserError, match="name it with --layer"):
        last_hidden_layer(nn.Sequential(nn.Flatten(), nn.ReLU()), x)
    with pytest.raises(UserError, match="no module called encoder"):
        build_detector("er", model, (), {}, x)
    named = OrderedDict(encoder=nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), classifier=nn.Linear(2, 3))
    model = nn.Sequential(nn.Identity(), nn.Sequential(named))
    assert build_detector("er", model, (), {}, x).layers == ("1.encoder",)


def test_what_cannot_be_learned_is_refused(exact, data) -> None:
    x, y, clean, noisy = data
    few = Reference(x[:30], y[:30], 10, "digits")
    for name, settings_, problem in (
        ("kde", {}, r"class \d has \d of the 30 clean training images and its density needs 5"),
        ("lid", {"k": 31}, r"30 reference images has fewer than the k = 31 neighbours"),
        ("lid", {"k": 100, "quirks": True}, r"a minibatch of 100 has fewer than the k = 100"),
        ("mahalanobis", {}, r"covariance of layer '9:input' is singular \(rank \d+ of 64"),
    ):
        with pytest.raises(UserError, match=problem):
            build_detector(name, exact, (), settings_, clean[:2]).learn(few)
    with pytest.raises(UserError, match=r"class 9 has 0 clean training images and its mean needs 2"):
        build_detector("mahalanobis", exact, (), {}, clean[:2]).learn(
            Reference(x, y.clamp(max=8), 10, "digits")
        )
    constant = copy.deepcopy(exact)
    constant[7].weight.data.zero_()
    with pytest.raises(UserError, match="gives the same features for all images of class 0"):
        fitted("kde", constant, data, layers=("8",))
    detector = build_detector("lid", constant, ("8",), {"reference": 150}, clean[:2])
    detector.learn(Reference(x[:150], y[:150], 10, "digits"))
    with pytest.raises(UserError, match="layer '8' gives the same number for every image"):
        detector.fit_scores(detector.evidence_of(clean), detector.evidence_of(noisy))
