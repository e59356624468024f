"""Maximum likelihood training of a flow, and the Gaussian it is compared with."""

import math

import numpy as np
import pytest
import torch

from robbench.data import Split
from robbench.defenses.flow import gaussian_bits_per_dim
from robbench.defenses.training import Report, TrainRequest, train
from robbench.models.loading import load_model
from robbench.models.zoo import read_entry


def split_of(images: torch.Tensor, levels: int) -> Split:
    n = len(images)
    return Split(torch.arange(n), torch.zeros(n, dtype=torch.int64), images.to(torch.uint8), levels)


def test_the_gaussian_agrees_with_a_fit_to_drawn_noise(digits):
    """Fit and score with many real draws of u through torch's own multivariate normal."""
    train_split, test = digits.train, digits.test.subset(torch.arange(60))
    generator, levels = torch.Generator().manual_seed(0), 17

    def dequantised(split, draws):
        k = split.images.flatten(1).double().repeat(draws, 1)
        return (k + torch.rand(k.shape, generator=generator, dtype=torch.float64)) / levels

    points = dequantised(train_split, 200)
    normal = torch.distributions.MultivariateNormal(points.mean(0), torch.cov(points.T, correction=0))
    nats = normal.log_prob(dequantised(test, 400)).reshape(400, 60).mean(0) - 64 * math.log(levels)
    expected = (-nats / (64 * math.log(2))).numpy()
    found = gaussian_bits_per_dim(train_split, test)
    np.testing.assert_allclose(found, expected, atol=0.02)
    assert found.mean() == pytest.approx(expected.mean(), abs=0.003)


def test_the_gaussian_of_pure_noise_is_known():
    """A constant pixel leaves U[0, 1/L): the Gaussian of variance 1/(12 L^2) costs log2 sqrt(2 pi e / 12)
    bits."""
    constant = split_of(torch.full((50, 1, 2, 2), 3), 17)
    np.testing.assert_allclose(
        gaussian_bits_per_dim(constant, constant), 0.5 * math.log2(2 * math.pi * math.e / 12), rtol=1e-9
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    reports: list[Report] = []
    request = TrainRequest(
        defense="clean",
        dataset="digits",
        epochs=3,
        train_samples=256,
        out=tmp_path_factory.mktemp("flow"),
        device="cpu",
        overrides={"architecture.steps": 1, "architecture.width": 8, "recipe.warmup_samples": 0},
    )
    return train(request, reports.append), [report for report in reports if report.epoch_done]


def test_a_flow_learns_and_keeps_its_best_validation_epoch(trained):
    folder, reports = trained
    assert folder.name == "digits-glow"
    scores = [report.score for report in reports]
    assert scores[-1] < scores[0]
    card = read_entry(folder).card
    assert card.kind == "flow"
    assert card.grey_levels == 17
    assert card.training.selected_epoch == 1 + int(np.argmin(scores))


def test_the_card_of_a_flow_holds_its_test_likelihood_beside_the_gaussian(trained, digits):
    folder, _ = trained
    loaded = load_model(read_entry(folder))
    numbers = {(m.metric, m.split): m for m in loaded.card.measurements}
    flow, gaussian = numbers["bits/dim", "test"], numbers["bits/dim of a Gaussian", "test"]
    assert (flow.n, gaussian.n, flow.unit, gaussian.unit) == (360, 360, "bits/dim", "bits/dim")
    x, ids = digits.test.x(torch.arange(360)), digits.test.ids
    again = loaded.module.bits_per_dim(x, n_samples=8, seed=5, sample_ids=ids)
    assert flow.value == pytest.approx(again.mean().item(), abs=0.03)  # other noise, same images
    positions = loaded.card.training.train_samples
    assert positions == 256
    assert "--set architecture.steps=1" in flow.command


def test_a_trained_flow_serves_a_joint_defense(trained, tmp_path):
    folder, _ = trained
    request = TrainRequest(
        defense="ijsat",
        dataset="digits",
        epochs=1,
        train_samples=64,
        flow=str(folder),
        out=tmp_path,
        device="cpu",
        overrides={"steps": 1},
    )
    card = read_entry(train(request)).card
    assert card.training.flow.name == "digits-glow"
    assert card.training.flow.sha256 == read_entry(folder).card.weights.sha256
