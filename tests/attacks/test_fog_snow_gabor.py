"""Fog, snow and Gabor noise against float64 references written from their definitions, loop by loop; their gradients,
sets and scenes."""

import math

import numpy as np
import pytest
import torch
from scipy.signal import convolve2d
from torch import Tensor, nn

from robbench.attacks import Attack, Victim, build_attack
from robbench.attacks.search.geometry import SampleNoise
from robbench.attacks.search.rendered import RenderedSpace, Renderer
from robbench.attacks.search.task import Samples
from robbench.attacks.unforeseen.fog import Fog
from robbench.attacks.unforeseen.gabor import Gabor, gabor_kernels
from robbench.attacks.unforeseen.snow import FAINTEST, BlockMean, Snow, line_kernels
from robbench.core.errors import AttackViolation, UserError
from robbench.specs import resolve_attack, threat_models

MODELS = threat_models()
RENDERERS = [Fog(128.0), Snow(0.5), Gabor(50.0)]
IDS = ["fog", "snow", "gabor"]
each = pytest.mark.parametrize("renderer", RENDERERS, ids=IDS)


def noise(ids: list[int], restart: int = 0, seed: int = 0, stream: str = "test") -> SampleNoise:
    return SampleNoise(seed, stream, torch.tensor(ids), restart, torch.device("cpu"))


def pictures(n: int, channels: int = 3, height: int = 24, width: int = 24) -> Tensor:
    return torch.rand((n, channels, height, width), generator=torch.Generator().manual_seed(n))


def parts(renderer: Renderer, x: Tensor, ids: list[int] | None = None) -> tuple[dict[str, Tensor], Tensor]:
    """Scene and start of images, the start on the set."""
    ids = list(range(len(x))) if ids is None else ids
    space = RenderedSpace(renderer, 0.1)
    state = space.start(x, torch.zeros(len(x), dtype=torch.int64), noise(ids))
    return dict(renderer.scene(x, noise(ids).scene())), state["variables"]


def small_attack(name: str, **changes: object) -> Attack:
    spec = resolve_attack(name, "imagenet", MODELS, steps=3)
    return build_attack(spec.model_copy(update=changes))


def linear(x: Tensor) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), 10, bias=False)).requires_grad_(False)


# --------------------------------------------------------------------------------------------------- renderings
def fog_reference(x: np.ndarray, v: np.ndarray, epsilon: float) -> np.ndarray:
    """One image [C,H,W]: the diamond-square algorithm point by point on a torus."""
    _, height, width = x.shape
    side = 1
    while side <= max(height, width):
        side *= 2
    heights, step, wibble, used = np.zeros((side, side)), side, 100.0, 0

    def at(row: int, column: int) -> float:
        return float(heights[row % side, column % side])

    while step > 1:
        half, count = step // 2, side // step
        for kind in ("centre", "right", "below"):
            for row in range(count):
                for column in range(count):
                    r, c = row * step, column * step
                    r += half * (kind != "right")
                    c += half * (kind != "below")
                    far = [(half, half), (half, -half), (-half, half), (-half, -half)]
                    cross = [(half, 0), (-half, 0), (0, half), (0, -half)]
                    near = far if kind == "centre" else cross
                    mean = sum(at(r + i, c + j) for i, j in near) / 4
                    heights[r, c] = mean + wibble * (2 * float(v[used]) - 1)
                    used += 1
        step, wibble = half, wibble / 2
    assert used == len(v)
    fog = (heights - heights.min()) / (heights.max() - heights.min())
    top, left = (side - height) // 2, (side - width) // 2
    fog = fog[top : top + height, left : left + width]
    strength = epsilon / 255
    return (x + strength * fog) / (x.max((1, 2), keepdims=True) + strength)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 5, 7), (3, 32, 32), (1, 28, 28), (2, 1, 1)])
def test_fog_is_the_diamond_square_map_over_the_image(shape: tuple[int, int, int]) -> None:
    x = pictures(2, *shape).double()
    _, v = parts(Fog(90.0), x)
    image = Fog(90.0).render(x, {}, v.double())
    for row in range(2):
        np.testing.assert_allclose(
            image[row], fog_reference(x[row].numpy(), v[row].numpy(), 90.0), atol=1e-12
        )
    assert image.max() <= 1
    torch.testing.assert_close(Fog(90.0).render(x.float(), {}, v), image.float(), atol=1e-5, rtol=0)


def test_maps_of_published_sizes() -> None:
    sides = {side: Fog(1.0).shape((3, side, side))[0] + 1 for side in (224, 32, 28, 8, 64)}
    assert sides == {224: 256**2, 32: 64**2, 28: 32**2, 8: 16**2, 64: 128**2}


def test_a_flat_map_is_no_fog_and_a_black_image_stays_black_without_fog() -> None:
    x = pictures(2, 1, 8, 8)
    x[1] = 0
    v = torch.full((2, 255), 0.5, requires_grad=True)
    image = Fog(128.0).render(x, {}, v)
    torch.testing.assert_close(image, x / (x.amax((2, 3), keepdim=True) + 128 / 255))
    (gradient,) = torch.autograd.grad(image.square().sum(), v)
    assert gradient.isfinite().all()
    assert torch.equal(Fog(0.0).render(x, {}, v)[1], x[1])


def snow_reference(x: np.ndarray, v: np.ndarray, kernels: np.ndarray, epsilon: float) -> np.ndarray:
    """One image [C,H,W]: seven grids of flakes, each convolved with its kernel."""
    channels, height, width = x.shape
    _, rows, columns = v.shape
    snow = np.zeros((4 * rows, 4 * columns))
    for k in range(7):
        flakes = np.zeros_like(snow)
        for row in range(rows):
            for column in range(columns):
                place = (4 * row, 4 * column + k) if k < 4 else (4 * row + k - 3, 4 * column)
                flakes[place] = v[k, row, column] ** 4
        snow += convolve2d(flakes, kernels[k], mode="same")
    grey = 0.2126 * x[0] + 0.7152 * x[1] + 0.0722 * x[2] if channels == 3 else x.mean(0)
    white = 0.75 * x + 0.25 * np.maximum(x, 1.5 * grey + 0.5)
    return np.clip(white + epsilon * snow[:height, :width], 0, 1)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (1, 28, 28), (3, 9, 14), (1, 3, 2)])
def test_snow_is_seven_grids_of_streaks_over_a_whitened_image(shape: tuple[int, int, int]) -> None:
    x = pictures(2, *shape).double()
    scene, v = parts(Snow(0.7), x)
    image = Snow(0.7).render(x, scene, v.double())
    for row in range(2):
        own = snow_reference(
            x[row].numpy(), v[row].double().numpy(), scene["kernels"][row].double().numpy(), 0.7
        )
        np.testing.assert_allclose(image[row], own, atol=1e-12)


def line_reference(
    rows: int, columns: int, width: int, sigma: float, mirrored: bool, reach: int
) -> np.ndarray:
    """The kernel of one line, pixel by pixel: a segment to (rows, columns) and to its opposite, with soft edges."""
    side, lines = 2 * reach + 1, np.zeros((2 * reach + 1, 2 * reach + 1))
    slope = min(rows, columns) / max(rows, columns)
    thickness = width * math.sqrt(1 + slope) / 2
    for along in range(max(rows, columns) + 1):
        for across in range(reach + 1):
            value = min(1.0, max(0.0, 1 + thickness / 2 - abs(across - slope * along)))
            row, column = (along, across) if rows > columns else (across, along)
            lines[reach + row, reach + column] = lines[reach - row, reach - column] = value
    if mirrored:
        lines = lines[:, ::-1]
    gauss = np.array([[math.exp(-(i * i + j * j) / (2 * sigma**2)) for j in (-1, 0, 1)] for i in (-1, 0, 1)])
    assert lines.shape == (side, side)
    return convolve2d(lines, gauss / gauss.sum(), mode="same")


@pytest.mark.parametrize(("reach", "shortest"), [(6, 2), (2, 1), (1, 1)])
def test_kernels_of_snow(reach: int, shortest: int) -> None:
    ids = list(range(40))
    found, again = line_kernels(noise(ids), reach), noise(ids)
    draws = [(again.uniform((7,)).double() + 1) / 2 for _ in range(4)]
    mirrored = again.uniform(()) < 0
    ends = [
        shortest + (u * (reach - shortest + 1)).floor().clamp(max=reach - shortest).int() for u in draws[:2]
    ]
    assert {int(end.min()) for end in ends} == {shortest}
    assert {int(end.max()) for end in ends} == {reach}
    widths = [1 if u < 0.6 else 3 if u < 0.9 else 5 for u in draws[2].flatten().tolist()]
    assert {1, 3, 5} == set(widths)
    assert 0 < int(mirrored.sum()) < 40
    for n in range(0, 40, 5):
        for k in range(7):
            sigma = 0.41 + 0.19 * float(draws[3][n, k])
            own = line_reference(
                int(ends[0][n, k]), int(ends[1][n, k]), widths[7 * n + k], sigma, bool(mirrored[n]), reach
            )
            np.testing.assert_allclose(found[n, k], own, atol=1e-5)


def gabor_reference(
    x: np.ndarray, v: np.ndarray, places: np.ndarray, kernel: np.ndarray, epsilon: float
) -> np.ndarray:
    sparse = np.zeros(x[0].size)
    sparse[places] = v
    waves = convolve2d(sparse.reshape(x[0].shape), kernel, mode="same")
    apart = waves - waves.mean()
    even = apart * 1.001 / (0.001 + np.abs(apart) / np.abs(apart).max())
    return np.clip(x + epsilon / 255 * (even - even.min()) / (even.max() - even.min()), 0, 1)


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 24), (3, 23, 41)])
def test_gabor_noise_is_sparse_points_convolved_and_evened_out(shape: tuple[int, int, int]) -> None:
    x = pictures(3, *shape).double()
    scene, v = parts(Gabor(50.0), x)
    assert v.shape == (3, round(shape[1] * shape[2] / 14))
    image = Gabor(50.0).render(x, scene, v)
    for row in range(3):
        places, kernel = scene["places"][row].numpy(), scene["kernels"][row, 0].double().numpy()
        assert len(set(places.tolist())) == len(places)
        own = gabor_reference(x[row].numpy(), v[row].double().numpy(), places, kernel, 50.0)
        np.testing.assert_allclose(image[row], own, atol=1e-9)


def test_kernels_of_gabor_noise() -> None:
    ids = list(range(60))
    found, again = gabor_kernels(noise(ids)), noise(ids)
    count, sigma, waves, angle = ((again.uniform(()).double() + 1) / 2 for _ in range(4))
    sides = 1 + (count * 10).floor().clamp(max=9).int()
    assert set(sides.tolist()) == set(range(1, 11))
    for n in range(0, 60, 7):
        own = np.zeros((23, 23))
        for side in range(int(sides[n])):
            turn = math.pi * (float(angle[n]) + side / int(sides[n]))
            for i, y in enumerate(np.linspace(-0.5, 0.5, 23)):
                for j, x in enumerate(np.linspace(-0.5, 0.5, 23)):
                    along, across = (
                        x * math.cos(turn) + y * math.sin(turn),
                        y * math.cos(turn) - x * math.sin(turn),
                    )
                    spread = 0.1 + 0.3 * float(sigma[n]) + 0.001
                    bell = math.exp(-(along**2 + across**2) / (2 * spread**2))
                    own[i, j] += bell * math.cos(2 * math.pi * (3 + 2.75 * float(waves[n])) * along)
        np.testing.assert_allclose(found[n, 0], own, atol=1e-4)


def test_variables_of_zero_are_no_gabor_noise() -> None:
    x = pictures(2, 1, 28, 28)
    scene, v = parts(Gabor(50.0), x)
    zero = torch.zeros_like(v, requires_grad=True)
    image = Gabor(50.0).render(x, scene, zero)
    assert torch.equal(image, x)
    (gradient,) = torch.autograd.grad(image.sum(), zero)
    assert gradient.isfinite().all()


# --------------------------------------------------------------------------------------------------- gradients
@pytest.mark.parametrize("renderer", [Fog(128.0), Snow(0.3)], ids=["fog", "snow"])
def test_gradients_are_finite_differences(renderer: Renderer) -> None:
    x = pictures(2, 3, 12, 12).double()
    scene, start = parts(renderer, x)
    v, weights = start.double().requires_grad_(), torch.sin(torch.arange(x.numel())).reshape(x.shape).double()

    def value(variables: Tensor) -> Tensor:
        return (renderer.render(x, scene, variables) * weights).sum((1, 2, 3))

    (gradient,) = torch.autograd.grad(value(v).sum(), v)
    flat = gradient.flatten(1)
    for place in torch.linspace(0, flat.shape[1] - 1, 17).long().tolist():
        shift = torch.zeros_like(flat)
        shift[:, place] = 1e-6
        shift = shift.reshape(v.shape)
        slope = (value(v.detach() + shift) - value(v.detach() - shift)) / 2e-6
        torch.testing.assert_close(flat[:, place], slope, atol=1e-6, rtol=1e-5)


def test_the_gradient_of_gabor_noise_takes_its_statistics_as_constants() -> None:
    """Against differences of a linear map: the sparse points convolved, times contrasts measured once."""
    x = pictures(1, 1, 28, 28).double() * 0.2 + 0.3
    scene, start = parts(Gabor(20.0), x)
    v, weights = (
        start.double().requires_grad_(),
        torch.sin(torch.arange(784)).reshape(28, 28).double().numpy(),
    )
    (gradient,) = torch.autograd.grad(
        (Gabor(20.0).render(x, scene, v)[0, 0] * torch.from_numpy(weights)).sum(), v
    )
    kernel = scene["kernels"][0, 0].double().numpy()

    def waves(variables: np.ndarray) -> np.ndarray:
        sparse = np.zeros(784)
        sparse[scene["places"][0].numpy()] = variables
        return convolve2d(sparse.reshape(28, 28), kernel, mode="same")

    here = v.detach()[0].numpy()
    apart = waves(here) - waves(here).mean()
    gain = 1.001 / (0.001 + np.abs(apart) / np.abs(apart).max())
    extent = (apart * gain).max() - (apart * gain).min()
    for place in range(0, len(here), 7):
        moved = here.copy()
        moved[place] += 1.0
        slope = ((waves(moved) - waves(here)) * gain / extent * weights).sum() * 20 / 255
        np.testing.assert_allclose(gradient[0, place], slope, rtol=1e-6, atol=1e-9)


# --------------------------------------------------------------------------------------------------- sets
@each
def test_every_step_ends_in_the_set(renderer: Renderer) -> None:
    x = pictures(2)
    space = RenderedSpace(renderer, step_size=0.6)
    state = space.start(x, torch.zeros(2, dtype=torch.int64), noise([3, 4]))
    generator = torch.Generator().manual_seed(0)
    for step in range(4):
        for constraint in renderer.constraints:
            assert (
                float((constraint.sizes(state["variables"]) - constraint.limit).max()) <= constraint.allowance
            ), step
        gradient = torch.rand(state["variables"].shape, generator=generator) - 0.1
        state = space.advance(state, {"variables": gradient})
    moved = {round(v, 3) for v in state["variables"].flatten().tolist()}
    assert len(moved) > 1


@pytest.mark.parametrize("shape", [(2, 7, 8, 8), (1, 7, 2, 2), (2, 7, 19, 10)])
def test_means_of_blocks_are_projected_on_the_nearest_point(shape: tuple[int, ...]) -> None:
    rule = BlockMean("mean", 0.2, 8, FAINTEST)
    values = torch.rand(shape, generator=torch.Generator().manual_seed(1)) * torch.tensor([0.2, 1.0])[
        torch.arange(7) % 2
    ].reshape(1, 7, 1, 1)
    values[0, 0, 0, 0] = -0.3
    projected, before = rule.project(values), values.clone()
    assert torch.equal(values, before)
    assert float(rule.sizes(projected).max()) <= 0.2 + rule.allowance
    for row in range(0, shape[2], 8):
        for column in range(0, shape[3], 8):
            for n in range(shape[0]):
                for k in range(7):
                    block = values[n, k, row : row + 8, column : column + 8].double().numpy()
                    found = projected[n, k, row : row + 8, column : column + 8]
                    np.testing.assert_allclose(found, nearest(block), atol=1e-6)


def nearest(block: np.ndarray) -> np.ndarray:
    """By bisection on the amount that all intensities are lowered."""
    low, high = 0.0, 1.0
    if np.clip(block, FAINTEST, None).mean() <= 0.2:
        return np.clip(block, FAINTEST, None)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if np.clip(block - middle, FAINTEST, None).mean() > 0.2 else (low, middle)
    return np.clip(block - high, FAINTEST, None)


@each
def test_a_sample_is_rendered_alone_as_in_a_batch(renderer: Renderer) -> None:
    x = pictures(3)
    x[1] *= 0.01
    scene, v = parts(renderer, x, [5, 6, 7])
    v[2] *= 0.5
    whole = renderer.render(x, scene, v)
    for row in range(3):
        only, start = parts(renderer, x[row : row + 1], [5 + row])
        if row < 2:
            torch.testing.assert_close(start[0], v[row])
        for name, value in only.items():
            assert torch.equal(value[0], scene[name][row])
        torch.testing.assert_close(
            renderer.render(x[row : row + 1], only, v[row : row + 1])[0], whole[row], atol=1e-6, rtol=0
        )


@pytest.mark.parametrize("renderer", RENDERERS[1:], ids=IDS[1:])
def test_scenes_differ_between_samples_seeds_and_attacks_and_not_between_restarts(renderer: Renderer) -> None:
    x = pictures(2)
    scene = renderer.scene(x, noise([1, 2]).scene())
    again = renderer.scene(x, noise([1, 2], restart=3).scene())
    others = [noise([1, 2], seed=1), noise([1, 2], stream="else"), noise([2, 1])]
    for name, value in scene.items():
        assert torch.equal(value, again[name])
        assert not torch.equal(value[0], value[1])
        assert not any(torch.equal(value, renderer.scene(x, other.scene())[name]) for other in others)
    assert not torch.equal(*(renderer.start((3, 24, 24), noise([1, 2], restart=r)) for r in (0, 1)))


# --------------------------------------------------------------------------------------------------- attacks
@pytest.mark.parametrize("name", IDS)
def test_examples_are_rendered_from_their_witness_in_any_batch(name: str) -> None:
    x = pictures(5)
    attack, net, ids = small_attack(name), linear(x), torch.tensor([4, 9, 2, 7, 30])
    y = net(x).argmax(1)
    outcomes = [attack.evaluate(Victim(net, batch_size=size), ids, x, y, 3, size) for size in (5, 2)]
    torch.testing.assert_close(outcomes[0].adversarial, outcomes[1].adversarial, atol=1e-6, rtol=0)
    (variables,) = outcomes[0].witness.values()
    samples, every = Samples(ids, x, y), torch.ones(5, dtype=torch.bool)

    def check(witness: Tensor, seed: int = 3) -> None:
        image = outcomes[0].adversarial
        attack.check_witness(Victim(net), samples, image, {"variables": witness}, every, seed)

    check(variables)
    with pytest.raises(AttackViolation, match=r"range \[.*\] of"):
        check(variables + 3.0)
    with pytest.raises(AttackViolation, match="image rendered from its witness"):
        check(variables.flip(0))
    if name != "fog":  # the scene is drawn from the seed
        with pytest.raises(AttackViolation, match="image rendered from its witness"):
            check(variables, seed=4)


@pytest.mark.parametrize("name", ["fog", "snow"])
def test_budget_zero_is_an_attack_and_not_the_clean_image(name: str) -> None:
    x = pictures(4) * 0.5
    net = linear(x)
    y = net(x).argmax(1)
    y[0] = (y[0] + 1) % 10  # misclassified, and attacked all the same
    attack = small_attack(name, epsilon=0.0)
    outcome = attack.evaluate(Victim(net), torch.arange(4), x, y, 0, 4)
    scene, v = parts(attack.space().renderer, x)
    assert (outcome.linf > 0.01).all()
    torch.testing.assert_close(outcome.adversarial, attack.space().renderer.render(x, scene, v))
    assert attack.spec.measure == "accuracy under attack"
    assert torch.equal(outcome.under_attack, net(outcome.adversarial).argmax(1) == y)
    assert torch.equal(outcome.robust, outcome.under_attack & (net(x).argmax(1) == y))
    assert not outcome.suspicions


def test_gabor_noise_is_a_worst_case_and_its_budget_zero_is_clean() -> None:
    x = pictures(3)
    net = linear(x)
    attack = small_attack("gabor", epsilon=0.0)
    assert attack.spec.measure == "robust accuracy"
    outcome = attack.evaluate(Victim(net), torch.arange(3), x, net(x).argmax(1), 0, 3)
    assert torch.equal(outcome.adversarial, x)


@pytest.mark.parametrize(
    ("name", "epsilon", "why"),
    [
        ("fog", 0.5, r"'fog' counts epsilon in pixels 0\.\.255 of fog; give 1 to 65536"),
        (
            "snow",
            128.0,
            r"'snow' counts epsilon in multiples of the snow on \[0,1\] pixels; give 0\.005 to 64",
        ),
        ("gabor", 0.05, r"'gabor' counts epsilon in pixels 0\.\.255 of noise; give 0\.5 to 16384"),
    ],
)
def test_budgets_on_another_scale_are_refused(name: str, epsilon: float, why: str) -> None:
    with pytest.raises(UserError, match=why):
        small_attack(name, epsilon=epsilon)


@pytest.mark.parametrize("changes", [{"relative_step_size": 0.25}, {"step_size": None}, {"step_size": 0}])
def test_steps_do_not_follow_from_the_budget(changes: dict[str, object]) -> None:
    assert small_attack("fog").space().step_size == 0.002236
    with pytest.raises(UserError, match=next(iter(changes))):
        small_attack("fog", parameters=changes)


def test_images_smaller_than_the_gabor_kernel_are_refused() -> None:
    x = pictures(2, 1, 22, 40)
    with pytest.raises(UserError, match=r"22 x 40 pixels are too small for the gabor attack's kernel of 23"):
        small_attack("gabor").evaluate(Victim(linear(x)), torch.arange(2), x, torch.zeros(2).long(), 0, 2)
