"""Renderers of the unforeseen attacks: against PIL and scipy, gradients by finite differences, vertices by linear
programming."""

import io
import math

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.fft import dctn
from scipy.ndimage import gaussian_filter, map_coordinates
from scipy.optimize import linprog
from torch import nn

from robbench.attacks import Victim, build_attack
from robbench.attacks.search.geometry import SampleNoise
from robbench.attacks.search.geometry_l1 import furthest_point
from robbench.attacks.search.rendered import RenderedSpace
from robbench.attacks.unforeseen.elastic import ElasticFlow
from robbench.attacks.unforeseen.jpeg import CHROMINANCE, LUMINANCE, JpegCoefficients, average_chroma
from robbench.attacks.unforeseen.pixels import PixelShift
from robbench.cli.app import main
from robbench.core.errors import UserError
from robbench.specs import ThreatModel, resolve_attack, threat_models

MODELS = threat_models()
TABLES = [np.array(table, dtype=np.float64).reshape(8, 8) for table in (LUMINANCE, CHROMINANCE, CHROMINANCE)]
GREY, COLOUR = (1, 16, 16), (3, 16, 16)
RENDERERS = {
    "elastic": (ElasticFlow(0.5, sigma=0.6), GREY),
    "elastic-colour": (ElasticFlow(2.0), COLOUR),
    "jpeg": (JpegCoefficients("linf", 1.0), GREY),
    "jpeg-colour": (JpegCoefficients("l2", 4.0), (3, 12, 17)),
    "pixels": (PixelShift("l1", 3.0), GREY),
}


def noise(n: int, seed: int = 0) -> SampleNoise:
    return SampleNoise(seed, "test", torch.arange(n), 0, torch.device("cpu"))


def pixels(n: int, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def start(renderer, x: torch.Tensor) -> torch.Tensor:
    return renderer.start(tuple(x.shape[1:]), noise(len(x))).double()


def render(renderer, x: torch.Tensor, variables: torch.Tensor) -> torch.Tensor:
    return renderer.render(x, renderer.scene(x, noise(len(x))), variables)


# ---------------------------------------------------------------------------------------------- every renderer
@pytest.mark.parametrize("name", RENDERERS)
def test_gradients_are_finite_differences(name):
    renderer, image = RENDERERS[name]
    x = pixels(1, image)
    variables = start(renderer, x).requires_grad_()
    weights = pixels(1, image, seed=1)

    def loss(v: torch.Tensor) -> torch.Tensor:
        return (weights * render(renderer, x, v)).sum()

    (gradient,) = torch.autograd.grad(loss(variables), variables)
    ray = torch.randn(variables.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with torch.no_grad():
        difference = (loss(variables + 1e-6 * ray) - loss(variables - 1e-6 * ray)) / 2e-6
    assert float((gradient * ray).sum()) == pytest.approx(float(difference), rel=2e-4)
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("name", RENDERERS)
def test_a_sample_is_rendered_alone_and_starts_inside_its_set(name):
    renderer, image = RENDERERS[name]
    x = pixels(3, image).float()
    space = RenderedSpace(renderer, 0.1)
    state = space.start(x, torch.zeros(3), noise(3))
    for _, constraint in space.constraints:
        assert (constraint.sizes(state["variables"]) <= constraint.limit + constraint.allowance).all()
    alone = space.start(x[1:2], torch.zeros(1), SampleNoise(0, "test", torch.tensor([1]), 0, x.device))
    assert torch.equal(alone["variables"], state["variables"][1:2])
    torch.testing.assert_close(space.render(alone)[0], space.render(state)[0][1:2])


# --------------------------------------------------------------------------------------------------------- JPEG
def planes_of(image: np.ndarray) -> list[np.ndarray]:
    """Y, Cb, Cr of an image [C,H,W] on 0..255, Cb and Cr at half the resolution; Y alone of one channel."""
    if len(image) == 1:
        return [image[0]]
    r, g, b = image
    y = 0.299 * r + 0.587 * g + 0.114 * b
    chroma = [128 + (b - y) / 1.772, 128 + (r - y) / 1.402]
    return [y, *(c.reshape(c.shape[0] // 2, 2, c.shape[1] // 2, 2).mean((1, 3)) for c in chroma)]


def blocks_of(plane: np.ndarray) -> np.ndarray:
    """Blocks [rows,columns,8,8] of a plane, continued to multiples of 8."""
    height, width = plane.shape
    whole = np.pad(plane, ((0, -height % 8), (0, -width % 8)), mode="edge")
    return whole.reshape(whole.shape[0] // 8, 8, whole.shape[1] // 8, 8).transpose(0, 2, 1, 3)


def rounding(image: np.ndarray) -> torch.Tensor:
    """The variables [1,D] that move every coefficient of an image [C,H,W] to the nearest step."""
    blocks = [dctn(blocks_of(plane) - 128.0, axes=(2, 3), norm="ortho") for plane in planes_of(image)]
    steps = np.concatenate([(b / table).ravel() for b, table in zip(blocks, TABLES, strict=False)])
    return 2.0 * torch.from_numpy(np.round(steps) - steps)[None]


def grey(height: int, width: int) -> np.ndarray:
    """A random image [1,height,width] on 0..255 of which no coefficient is so near a half step that libjpeg's integer
    arithmetic may round it to the other side."""
    drawn = (np.random.default_rng(seed).integers(0, 256, (1, height, width)) for seed in range(999))
    return next(image for image in drawn if rounding(image.astype(np.float64)).abs().max() < 1 - 2e-3)


def by_pil(picture: Image.Image, mode: str) -> np.ndarray:
    """A picture written as JPEG of quality 50 and read again, [C,H,W]."""
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=50, subsampling="4:2:0")
    read = Image.open(file)
    if mode == "YCbCr":
        read.draft("YCbCr", read.size)  # without libjpeg's conversion to RGB
    return np.atleast_3d(np.asarray(read.convert(mode), dtype=np.float64)).transpose(2, 0, 1)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (28, 28), (11, 30)])
def test_grey_images_decode_as_pil_decodes_them(height, width):
    image = grey(height, width)
    variables = rounding(image.astype(np.float64))
    renderer = JpegCoefficients("linf", 1.0)
    assert renderer.shape((1, height, width)) == variables.shape[1:]
    found = render(renderer, torch.from_numpy(image)[None] / 255.0, variables)[0].numpy()
    expected = by_pil(Image.fromarray(image[0].astype(np.uint8)), "L")
    assert np.abs(255 * found.clip(0, 1) - expected).max() <= 1.01  # PIL's pixels are whole numbers


def fancy(plane: np.ndarray) -> np.ndarray:
    """libjpeg's upsampling of a plane: 3/4 of the nearer sample and 1/4 of the next, in both directions."""
    for axis in (0, 1):
        inner = np.moveaxis(plane, axis, 0)
        before, after = np.concatenate([inner[:1], inner[:-1]]), np.concatenate([inner[1:], inner[-1:]])
        pairs = np.stack([0.75 * inner + 0.25 * before, 0.75 * inner + 0.25 * after], 1)
        plane = np.moveaxis(pairs.reshape(-1, *inner.shape[1:]), 0, axis)
    return plane


@pytest.mark.parametrize(("height", "width"), [(16, 16), (32, 48), (28, 28)])
def test_colour_images_decode_as_pil_decodes_them(height, width):
    """Planes are compared: PIL interpolates chrominance, the attack repeats it, as the public code does."""
    generator = np.random.default_rng(1)
    light = generator.integers(60, 196, (height, width))
    chroma = generator.integers(100, 156, (2, height // 2, width // 2)).repeat(2, 1).repeat(2, 2)
    picture = Image.merge("YCbCr", [Image.fromarray(p.astype(np.uint8)) for p in (light, *chroma)])
    y, cb, cr = (plane.astype(np.float64) for plane in (light, *(chroma - 128)))
    image = np.stack([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb])
    renderer, variables = JpegCoefficients("linf", 1.0), rounding(image)
    assert renderer.shape((3, height, width)) == variables.shape[1:]
    found = planes_of(255 * render(renderer, torch.from_numpy(image)[None] / 255.0, variables)[0].numpy())
    luma, blue, red = by_pil(picture, "YCbCr")
    assert np.abs(found[0] - luma).max() <= 1.01
    for own, theirs in zip(found[1:], (blue, red), strict=True):
        gap = np.abs(fancy(own) - theirs)
        inside = gap[: height // 2 * 2 - 1, : width // 2 * 2 - 1] if height % 16 else gap
        assert inside.max() <= 1.51


def test_colours_are_those_of_pil():
    image = np.random.default_rng(2).integers(0, 256, (16, 16, 3)).astype(np.uint8)
    converted = np.asarray(Image.fromarray(image).convert("YCbCr"), dtype=np.float64)
    y, cb, cr = planes_of(image.transpose(2, 0, 1).astype(np.float64))
    smooth = (
        255 * average_chroma(torch.from_numpy(image.transpose(2, 0, 1))[None] / 255.0)[0].double().numpy()
    )
    assert np.abs(y - converted[..., 0]).max() <= 1.0
    for own, plane in zip((cb, cr), converted[..., 1:].transpose(2, 0, 1), strict=True):
        assert np.abs(own - plane.reshape(8, 2, 8, 2).mean((1, 3))).max() <= 1.0
    for own, again in zip((y, cb, cr), planes_of(smooth), strict=True):  # averaging once is averaging twice
        np.testing.assert_allclose(again, own, atol=2e-3)


def test_no_change_renders_a_grey_image_itself_and_a_coloured_one_with_averaged_chrominance():
    renderer = JpegCoefficients("linf", 1.0)
    for image in ((1, 28, 28), (3, 17, 8)):
        x = pixels(2, image)
        zero = torch.zeros(2, *renderer.shape(image), dtype=torch.float64)
        gap = (render(renderer, x, zero) - x).abs().amax()
        assert gap == 0 if image[0] == 1 else gap > 0.05
    even = torch.full((1, 3, 8, 8), 0.3, dtype=torch.float64)
    zero = torch.zeros(1, 3 * 64, dtype=torch.float64)
    torch.testing.assert_close(render(renderer, even, zero), even)


@pytest.mark.parametrize("image", [(1, 7, 8), (3, 8, 4), (2, 16, 16), (4, 16, 16)])
def test_jpeg_refuses_sides_below_a_block_and_other_channels(image):
    spec = resolve_attack("jpeg-linf", "cifar10", MODELS)
    model = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(image), 3))
    with pytest.raises(UserError, match=r"1 or 3 channels .* at least 8 pixels"):
        build_attack(spec)(model, torch.rand(2, *image), torch.zeros(2, dtype=torch.int64))


# -------------------------------------------------------------------------------------------------- Frank-Wolfe
@given(seed=st.integers(0, 10**6), radius=st.floats(0.0, 6.0))
@settings(max_examples=30)
def test_the_vertex_is_the_optimum_of_the_linear_program(seed, radius):
    """max <g, z> over ||z||_1 <= radius, |z_i| <= room_i, in z = p - q with p, q >= 0."""
    generator = np.random.default_rng(seed)
    g = np.round(generator.normal(size=7), 1)  # ties and zeros
    x = np.round(2 * generator.uniform(size=7), 0) / 2 if seed % 2 else generator.uniform(size=7)
    up, down = 1 - x, x
    found = furthest_point(
        torch.tensor(g)[None], torch.tensor(np.where(g > 0, up, down))[None], radius
    ).numpy()[0]
    best = linprog(
        -np.concatenate([g, -g]),
        A_ub=np.ones((1, 14)),
        b_ub=[radius],
        bounds=[(0, r) for r in (*up, *down)],
    )
    assert g @ found == pytest.approx(-best.fun, abs=1e-7)
    assert np.abs(found).sum() <= radius + 1e-9
    assert (found <= up + 1e-12).all()
    assert (found >= -down - 1e-12).all()


def test_a_gradient_that_is_not_finite_moves_nothing():
    gradient = torch.tensor([[float("nan"), float("inf"), 0.0, -1e-30]])
    vertex = furthest_point(gradient, torch.full((1, 4), 2.0), 5.0)
    assert vertex.tolist() == [[0.0, 0.0, 0.0, -2.0]]


@pytest.mark.parametrize(
    "renderer", [PixelShift("l1", 2.0), JpegCoefficients("l1", 20.0)], ids=["pixels", "jpeg"]
)
def test_frank_wolfe_on_a_linear_model_ends_at_the_vertex(renderer):
    """Of a linear loss every step, the first alone too, reaches the optimum over ball and box."""
    x = pixels(4, (1, 8, 8)).float()
    space = RenderedSpace(renderer, 0.0, "l1", "frank-wolfe")
    state = space.start(x, torch.zeros(4), noise(4))
    gradient = torch.randn(4, *renderer.shape((1, 8, 8)), generator=torch.Generator().manual_seed(0))
    for step in range(3):
        state = space.advance({**state, "iteration": torch.full((4,), step)}, {"variables": gradient})
        expected = renderer.vertex(x, state["variables"], gradient)
        torch.testing.assert_close(state["variables"], expected, atol=1e-5, rtol=0)
        assert state["variables"].flatten(1).abs().sum(1).amin() == pytest.approx(renderer.epsilon, rel=1e-5)


def test_pixels_stay_in_the_box_after_every_step():
    x = torch.cat([torch.zeros(2, 1, 8, 8), torch.ones(2, 1, 8, 8)])
    for norm, optimizer in (("linf", "steps"), ("l2", "steps"), ("l1", "frank-wolfe")):
        space = RenderedSpace(PixelShift(norm, 0.5), 0.2, norm, optimizer)
        state = {**space.start(x, torch.zeros(4), noise(4)), "iteration": torch.zeros(4, dtype=torch.int64)}
        moved = space.advance(state, {"variables": torch.randn(x.shape, generator=torch.Generator())})
        image = space.render(moved)[0]
        assert ((image >= -1e-6) & (image <= 1 + 1e-6)).all()


# ------------------------------------------------------------------------------------------------------ elastic
def test_elastic_is_scipys_filter_and_interpolation():
    """Displacements are epsilon x 2 / side of a grid from -1 to 1, hence (side - 1) / side pixels each."""
    renderer, side = ElasticFlow(2.0), 32
    x, flow = pixels(1, (1, side, side)), 2 * torch.rand(1, 2, side, side, dtype=torch.float64) - 1
    found = render(renderer, x, flow)[0, 0].numpy()
    sigma = 3 * side / 224
    smooth = [gaussian_filter(one.numpy(), sigma, mode="mirror", truncate=2 / sigma) for one in flow[0]]
    rows, columns = np.meshgrid(np.arange(side), np.arange(side), indexing="ij")
    scale = (side - 1) / side
    places = [rows + scale * smooth[1], columns + scale * smooth[0]]
    # A frame of zeros: outside the image is black, also between its border and the next pixel.
    framed = np.pad(x[0, 0].numpy(), 2)
    expected = map_coordinates(framed, [place + 2 for place in places], order=1)
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("side", [8, 28, 32])
def test_no_flow_is_the_clean_image(side):
    """With align_corners=False, PyTorch's default, the same grid distorts."""
    x = pixels(1, (1, side, side))
    renderer = ElasticFlow(0.5)
    zero = torch.zeros(1, 2, side, side, dtype=torch.float64)
    torch.testing.assert_close(render(renderer, x, zero), x, atol=1e-5, rtol=0)
    line = torch.linspace(-1, 1, side, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1)[None]
    assert (nn.functional.grid_sample(x, grid, align_corners=False) - x).abs().max() > 0.1


@pytest.mark.parametrize(("side", "kernel"), [(8, 3), (28, 5), (32, 5), (224, 25)])
def test_the_kernel_is_that_of_the_public_code(side, kernel):
    weights = ElasticFlow(0.5).weights(side)
    sigma = {32: 0.4286, 224: 3.0}.get(side, 3 * side / 224)
    assert len(weights) == kernel
    assert float(weights[kernel // 2 + 1] / weights[kernel // 2]) == pytest.approx(
        math.exp(-0.5 / sigma**2), rel=1e-3
    )
    assert float(weights.sum()) == pytest.approx(1.0)


# -------------------------------------------------------------------------------------------------------- users
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("elastic", "--epsilon", "8/255"),
            "--epsilon 8/255: attack 'elastic' counts epsilon in pixels of displace",
        ),
        (("uar-linf", "--epsilon", "8"), "--epsilon 8: attack 'uar-linf' counts epsilon in [0,1] pixels"),
        (("uar-l2", "--epsilon", "80"), "epsilon 80: attack 'uar-l2' counts epsilon on pixels 0..1"),
        (("jpeg-l1", "--epsilon", "8/255"), "half steps of quantisation at quality 50; give 1 to"),
        (("uar",), "has no epsilon for data set 'digits'"),
    ],
)
def test_budgets_of_another_scale_are_refused_before_the_run(tmp_path, arguments, message):
    out = tmp_path / "run"
    name, *rest = arguments
    command = ["run", "--model", "digits-standard", "--attacks", name, *rest, "--n", "4", "--out", str(out)]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 2
    assert message in result.output
    assert not out.exists()


def test_frank_wolfe_without_vertices_is_refused():
    for name in ("elastic", "uar-l2"):
        spec = resolve_attack(name, "digits", MODELS)
        changed = spec.model_copy(update={"parameters": {**spec.parameters, "optimizer": "frank-wolfe"}})
        with pytest.raises(UserError, match="needs norm l1"):
            build_attack(changed)


def test_groups_and_grids_are_those_of_the_papers():
    model = MODELS["unforeseen"]
    assert model.members("unforeseen") == ("elastic", "jpeg-linf", "uar-l2")
    assert {"elastic", "jpeg-l1", "uar-l2"} <= set(model.members("unforeseen-om"))
    calibrated = {"cifar10", "imagenet", "digits", "fashionmnist"}
    assert all(model.attacks[name].budgets.keys() <= calibrated for name in model.members("uar"))
    totals = [resolve_attack(f"uar-l1-{k}", "cifar10", MODELS).epsilon for k in range(1, 7)]
    per_pixel = (0.0634766, 0.1269531, 0.2539063, 0.5078125, 2.03125, 8.125)  # `eps_max` of the public code
    assert totals == pytest.approx([3 * 32 * 32 * one / 255 for one in per_pixel], rel=1e-5)


def test_a_model_that_was_written_out_reads_the_same_and_another_attack_of_a_taken_name_is_refused():
    model = MODELS["unforeseen"]
    written = model.model_dump(mode="json")
    assert ThreatModel.model_validate(written) == model
    written["attacks"]["elastic-1"]["budgets"]["cifar10"]["epsilon"] = 0.3
    with pytest.raises(ValueError, match="'elastic-1' exists already"):
        ThreatModel.model_validate(written)


def test_at_a_budget_of_zero_jpeg_still_renders(classifier, images):
    """Its set does not hold the clean image: every sample is rendered, and its column is accuracy under attack."""
    ids, x, y = (part[:8] for part in images)
    spec = resolve_attack("jpeg-linf", "digits", MODELS, epsilon=0.0, steps=2)
    attack = build_attack(spec)
    outcome = attack.evaluate(Victim(classifier), ids, x, y, 0, 8)
    assert attack.spec.semantics == "perturbation"
    assert outcome.witness["variables"].abs().max() == 0
    assert torch.equal(outcome.adversarial, x)
    assert (outcome.forwards > 0).all()
    assert (outcome.backwards == 0).all()  # there is one image only, so that no step is taken
