"""Intrinsic dimension: manifolds of known dimension, the formula written out, the command."""

import json

import numpy as np
import pytest
from click.testing import CliRunner

from robbench.cli.app import main
from robbench.core.errors import UserError
from robbench.statistics.intrinsic_dimension import intrinsic_dimension


def embedded(points: np.ndarray, size: int) -> np.ndarray:
    """`points` [N,d] after a random isometry into `size` dimensions."""
    basis = np.linalg.qr(np.random.default_rng(1).normal(size=(size, points.shape[1])))[0]
    return points @ basis.T


def manifold(name: str, n: int) -> np.ndarray:
    random = np.random.default_rng(0)
    if name == "sphere":  # the surface, of dimension 4 in 5
        points = random.normal(size=(n, 5))
        return embedded(points / np.linalg.norm(points, axis=1, keepdims=True), 40)
    if name == "roll":  # a rolled-up sheet, of dimension 2 in 3
        angle, height = 1.5 * np.pi * (1 + 2 * random.random(n)), 21 * random.random(n)
        return np.stack([angle * np.cos(angle), height, angle * np.sin(angle)], 1)
    return embedded(random.random((n, int(name))), 40)


@pytest.mark.parametrize(("name", "dimension"), [("1", 1), ("2", 2), ("5", 5), ("sphere", 4), ("roll", 2)])
def test_manifolds_of_known_dimension(name: str, dimension: int) -> None:
    """levina has no bias far from a border; the mean of 1 / m_k is (k - 1) / (k - 2) over the dimension."""
    found, bias = (
        intrinsic_dimension(manifold(name, 1000)),
        np.mean([(k - 2) / (k - 1) for k in range(6, 13)]),
    )
    assert found.points == 1000
    assert found.levina == pytest.approx(
        dimension, rel=0.06 if dimension < 5 else 0.12
    )  # a cube has many borders
    assert found.mackay == pytest.approx(bias * dimension, rel=0.06 if dimension < 5 else 0.12)


def test_the_estimates_are_their_formulas() -> None:
    points = np.random.default_rng(3).normal(size=(30, 4))
    mackay, levina = [], []
    for k in range(6, 13):
        local = []
        for point in points:
            distances = np.sort(np.linalg.norm(points - point, axis=1))[1:]
            local.append((k - 2) / sum(np.log(distances[k - 1] / distances[j]) for j in range(k)))
        levina.append(sum(local) / 30)
        mackay.append(30 / sum(1 / m for m in local))
    found = intrinsic_dimension(points)
    assert found.mackay == pytest.approx(np.mean(mackay), rel=1e-6)
    assert found.levina == pytest.approx(np.mean(levina), rel=1e-6)


def test_scale_and_repetition_change_nothing() -> None:
    points = np.random.default_rng(4).normal(size=(60, 3))
    once = intrinsic_dimension(points)
    for other in (points * 255, np.concatenate([points, points[:20]])):
        again = intrinsic_dimension(other)
        assert again.points == 60
        assert again.mackay == pytest.approx(once.mackay, rel=1e-6)


@pytest.mark.parametrize("points", [np.zeros((50, 4)), np.eye(12), np.zeros((0, 3))])
def test_too_few_different_points_are_refused(points: np.ndarray) -> None:
    with pytest.raises(UserError, match="at least 13 different images"):
        intrinsic_dimension(points)


def invoked(*words: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, ["show", *words, "--intrinsic-dimension"])
    return result.exit_code, result.stdout, result.stderr


def test_the_command_shows_estimates_of_a_data_set() -> None:
    code, out, _ = invoked("digits", "--json")
    found = json.loads(out)
    assert code == 0
    assert (found["split"], found["images"], found["published"]) == ("train", 1000, None)
    assert 4 < found["mackay"] < found["levina"] < 10
    code, out, _ = invoked("digits")
    assert f"mackay    {found['mackay']:.2f}" in out


def test_published_dimensions_stand_beside() -> None:
    from robbench.cli.intrinsic_dimension import published_dimension

    names = ("mnist", "cifar10", "stl10", "tiny-imagenet", "digits")
    assert [published_dimension(name) for name in names] == [13, 17, 20, 19, None]


def test_what_is_no_data_set_is_refused_in_a_line() -> None:
    code, _, err = invoked("pgd20")
    assert (code, err.count("\n")) == (2, 1)
    assert "pgd20" in err
