"""Samples of a flow under another."""

import csv

import numpy as np
import pytest
import torch

from robbench.cli.samples import SamplesRequest, samples_report
from robbench.core.errors import UserError
from robbench.models.flows.glow import Glow
from robbench.run.flow_samples import score_images, score_samples


def test_samples_are_grey_levels_scored_like_images(flow):
    frozen = flow.freeze()
    found = score_samples(frozen, frozen, (0.0, 0.7, 1.0), 300, seed=5)
    means = [one.summary.mean for one in found]
    assert means == sorted(means), "a lower temperature is closer to the mode"
    again = score_samples(frozen, frozen, (0.7,), 300, seed=5)[0]
    assert again == found[1]
    image = frozen.sample(1, 0.0)
    grid = torch.round(image * 16) / 16
    bits = [frozen.bits_per_dim(grid, seed=5, sample_ids=[i]).item() for i in range(300)]
    assert found[0].summary.mean == pytest.approx(np.mean(bits), rel=1e-5)


def test_images_are_scored_one_by_one_with_noise_of_their_own(flow, images):
    _, x, _ = images
    frozen = flow.freeze()
    found = score_images(frozen, x, seed=4).summary
    bits = [float(frozen.bits_per_dim(x[i : i + 1], seed=4, sample_ids=[i])) for i in range(len(x))]
    spread = 1.96 * np.std(bits, ddof=1) / len(bits) ** 0.5
    assert found.mean == pytest.approx(np.mean(bits), rel=1e-5)
    assert found.median == pytest.approx(np.median(bits), rel=1e-5)
    assert (found.lower, found.upper) == pytest.approx(
        (np.mean(bits) - spread, np.mean(bits) + spread), rel=1e-4
    )


def test_flows_of_different_images_are_refused(flow):
    other = Glow((1, 8, 8), 256, levels=1, steps=1, width=4).freeze()
    with pytest.raises(UserError, match=r"17.*256|256.*17"):
        score_samples(flow.freeze(), other, (1.0,), 2, 0)


def test_the_report_names_what_was_scored(tmp_path, capsys):
    request = SamplesRequest(("digits-glow",), "digits-glow", (0.5, 1.0), n=40)
    (path,) = samples_report(request, tmp_path)
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert [row["images"] for row in rows][:2] == ["test images", "uniform noise images"]
    assert [row["temperature"] for row in rows] == ["", "", "0.5", "1.0"]
    test, noise, *_ = (float(row["mean"]) for row in rows)
    assert noise > test + 5
    assert "Bits/dim under digits-glow" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"under": "digits-at"}, ["--under", "digits-at", "classifier"]),
        ({"models": ("digits-at",)}, ["--model", "digits-at", "classifier"]),
        ({"models": ("fashionmnist-glow",)}, ["fashionmnist", "digits"]),
        ({"models": ("nothing-glow",)}, ["nothing-glow", "digits-glow"]),
    ],
)
def test_refusals(tmp_path, changes, words):
    asked = {"models": ("digits-glow",), "under": "digits-glow", "temperatures": (1.0,), "n": 2, **changes}
    with pytest.raises(UserError) as caught:
        samples_report(SamplesRequest(**asked), tmp_path)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert not list(tmp_path.iterdir())
