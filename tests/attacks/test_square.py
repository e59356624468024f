"""Square attack: windows against a slow transcript of the paper, admissibility, batch independence, counts, parity."""

import contextlib
import io
import math

import numpy as np
import pytest
import torch
from grids import slow_but
from hypothesis import given, settings
from hypothesis import strategies as st
from pyautoattack.square import SquareAttack
from torch import Tensor, nn

from robbench.attacks.autoattack.square import PatternWindows, Schedule, Square, pattern, window_sizes
from robbench.attacks.base import Candidates, Task
from robbench.attacks.search.active import run_search
from robbench.attacks.search.geometry import norm_of
from robbench.attacks.victim import Victim, margins
from robbench.core.errors import UserError
from robbench.models.loading import load_model
from robbench.models.zoo import find_model, zoo_entries
from robbench.specs import Norm

NORMS: tuple[Norm, ...] = ("linf", "l2", "l1")
RADIUS: dict[Norm, float] = {"linf": 0.15, "l2": 0.8, "l1": 3.2}
REFERENCE: dict[Norm, str] = {"linf": "Linf", "l2": "L2", "l1": "L1"}


class Counting(nn.Module):
    """Counts the images it sees."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.images = inner, 0

    def forward(self, x: Tensor) -> Tensor:
        self.images += len(x)
        return self.inner(x)


class Constant(nn.Module):
    """Certain of class 0, whatever it sees."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tensor([1.0, 0.0, 0.0]).expand(len(x), 3)


def linear(shape: tuple[int, ...], classes: int = 4, scale: float = 1.0, seed: int = 0) -> nn.Module:
    """A random linear model: logits of pixels."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), classes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model.requires_grad_(False)


def pixels(n: int, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Images with many pixels at exactly 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand((n, *shape), generator=generator) * 1.6 - 0.3).clamp(0, 1)


def attack(
    model: nn.Module, search: Square, x: Tensor, y: Tensor, ids: Tensor | None = None, batch: int = 256
) -> Candidates:
    n = len(x)
    zeros = torch.zeros(n, dtype=torch.int64)
    found = Candidates(x.clone(), zeros - 1, zeros.clone(), zeros.clone(), ["square"] * n)
    task = Task(torch.arange(n) if ids is None else ids, x, y, y, 0, batch)
    run_search(Victim(model), search, task, found, torch.arange(n))
    return found


def fooled(model: nn.Module, images: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        return margins(model(images), y) <= 0


def reference_pattern(norm: Norm, side: int) -> Tensor:
    reference = SquareAttack(lambda x: x, norm=REFERENCE[norm], eps=1.0, device="cpu")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return reference.eta(side)


@pytest.mark.parametrize("norm", ["l2", "l1"])
@pytest.mark.parametrize("side", [1, 2, 3, 4, 5, 8, 13, 44])
def test_pattern_is_the_references_up_to_its_direction(norm: Norm, side: int):
    ours, reference = pattern(side, norm), reference_pattern(norm, side)
    same = [torch.allclose(ours, turned, atol=1e-6) for turned in (reference, reference.T)]
    assert any(same)
    assert float(norm_of(ours[None], norm)) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (1, 8, 8), (3, 5, 9), (3, 224, 224)])
@pytest.mark.parametrize("rescale", [False, True])
def test_window_sizes_are_the_references(norm: Norm, shape: tuple[int, int, int], rescale: bool):
    """The reference's `p_selection` and the side it makes of it (its source, one line a norm)."""
    c, h, w = shape
    reference = SquareAttack(lambda x: x, n_queries=5000, p_init=0.8, resc_schedule=rescale)
    sides = []
    for query in range(5000):
        side = round(math.sqrt(reference.p_selection(query) * c * h * w / c))
        if norm == "linf":
            side = max(side, 1)
        else:
            side = max(side, 3)
            side += side % 2 == 0
        sides.append(min(side, min(h, w)))
    assert window_sizes(norm, shape, 5000, 0.8, rescale)[1:].tolist() == sides


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    ("shape", "classes"), [((1, 8, 8), 4), ((3, 5, 9), 2), ((2, 3, 3), 3), ((3, 12, 7), 5)]
)
def test_every_query_is_admissible_and_windows_stay_inside(
    norm: Norm, shape: tuple[int, int, int], classes: int
):
    x, y = pixels(9, shape), torch.arange(9) % classes
    model = linear(shape, classes)
    queried: list[Tensor] = []

    class Sure(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            queried.append(images.clone())
            return model(images) + 1e4 * nn.functional.one_hot(y, classes)

    search, victim = Square(norm, RADIUS[norm], iterations=80), Victim(Sure())
    state = search.begin(victim, Task(torch.arange(9), x, y, y, 0))
    for _ in range(80):
        state = search.step(victim, state)
    for images in [*queried, state["adversarial"]]:
        assert images.dtype == torch.float32
        assert float(images.min()) >= 0.0
        assert float(images.max()) <= 1.0
        assert float(norm_of(images.double() - x.double(), norm).max()) <= RADIUS[norm] * (1 + 1e-6)


def test_linf_queries_stand_at_the_corners_of_the_ball_and_change_one_square_of_one_sign(classifier, images):
    """Start of vertical stripes, then one window of the schedule's side with one sign a channel."""
    _, x, y = images
    seen: list[Tensor] = []

    class Watching(nn.Module):
        def forward(self, candidates: Tensor) -> Tensor:
            seen.append(candidates.clone())
            return torch.tensor([1.0, 0.0]).expand(len(candidates), 2)

    search = Square("linf", 0.1, iterations=60, ahead=1)
    attack(Watching(), search, x, torch.zeros_like(y))
    start = seen[0]
    low, high = (x - 0.1).clamp(0, 1), (x + 0.1).clamp(0, 1)
    up = start == high
    assert bool((up | (start == low)).all())
    assert bool((up == up[:, :, :1]).all())
    assert 0.4 < float(up[:, :, 0].float().mean()) < 0.6
    sides = window_sizes("linf", (1, 8, 8), 60)
    corners: set[tuple[int, int]] = set()
    for query, candidates in enumerate(seen[1:], start=1):
        for row in range(len(x)):
            changed = (candidates[row, 0] != start[row, 0]).nonzero()
            if not len(changed):
                continue
            (top, left), (bottom, right) = changed.amin(0).tolist(), changed.amax(0).tolist()
            assert max(bottom - top, right - left) < int(sides[query])
            ups = (candidates[row, 0] == high[row, 0])[tuple(changed.T)]
            assert bool(ups.all()) or not bool(ups.any())
            corners |= {(bottom, right)}
    assert max(bottom for bottom, _ in corners) == 7  # the last row and column are reached too
    assert max(right for _, right in corners) == 7


def slow_step(
    norm: Norm, x: np.ndarray, best: np.ndarray, eps: float, top: list[int], left: list[int], eta: np.ndarray
) -> np.ndarray:
    """Query of algorithm 3 of the paper (and of the reference) for one sample, in float64; eta [C,s,s] with signs."""
    order = 2 if norm == "l2" else 1
    c, s = x.shape[0], eta.shape[-1]
    delta = best - x
    one, two = ((slice(None), slice(top[i], top[i] + s), slice(left[i], left[i] + s)) for i in range(2))
    both = np.zeros(x.shape, bool)
    both[one] = both[two] = True
    room = max(eps**order - (np.abs(delta) ** order).sum(), 0.0)
    mass = (np.abs(delta * both) ** order).sum((1, 2), keepdims=True)
    old = delta[one]
    size = (np.abs(old) ** order).sum((1, 2), keepdims=True) ** (1 / order)
    new = eta + old / (1e-12 + size)
    reach = (room / c + mass) ** 0.5 if norm == "l2" else (room / c + mass) * c
    new = new / (np.abs(new) ** order).sum((1, 2), keepdims=True) ** (1 / order) * reach
    delta = delta.copy()
    delta[two] = 0.0
    delta[one] = new
    return delta


@pytest.mark.parametrize("norm", ["l2", "l1"])
@given(
    channels=st.integers(1, 3),
    height=st.integers(4, 9),
    width=st.integers(4, 9),
    seed=st.integers(0, 10**6),
    data=st.data(),
)
@settings(max_examples=40)
def test_window_moves_are_those_of_the_paper(
    norm: Norm, channels: int, height: int, width: int, seed: int, data: st.DataObject
):
    shape = (channels, height, width)
    side = data.draw(st.integers(2, min(height, width)))  # on one pixel past and pattern may cancel exactly
    top = data.draw(st.lists(st.integers(0, height - side), min_size=2, max_size=2))
    left = data.draw(st.lists(st.integers(0, width - side), min_size=2, max_size=2))
    turned = data.draw(st.integers(0, 1))
    rng = np.random.default_rng(seed)
    signs = rng.integers(0, 2, channels) * 2.0 - 1
    schedule = Schedule.of(torch.tensor([side, side]), shape, torch.device("cpu"))
    moves = PatternWindows(norm, 1.0, shape, schedule)
    delta = rng.normal(size=shape)
    delta *= 0.9 / float(norm_of(torch.tensor(delta)[None], norm))
    view = moves.patterns[0, turned, height - top[0], width - left[0]]
    spans = [np.zeros((1, 2, n), np.float32) for n in (height, width)]
    for i in range(2):
        spans[0][0, i, top[i] : top[i] + side] = spans[1][0, i, left[i] : left[i] + side] = 1.0
    ours = moves._move_windows(
        torch.tensor(delta, dtype=torch.float32)[None],
        torch.from_numpy(spans[0]),
        torch.from_numpy(spans[1]),
        view[None, None],
        torch.tensor(signs, dtype=torch.float32)[None],
    )
    eta = pattern(side, norm).numpy().astype(float)
    eta = (eta.T if turned else eta) * signs[:, None, None]
    expected = slow_step(norm, np.zeros(shape), delta, moves.radius, top, left, eta)
    assert np.abs(ours[0].numpy() - expected).max() < 2e-3


@pytest.mark.parametrize("norm", ["l2", "l1"])
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (2, 5, 9), (1, 3, 3)])
def test_l2_and_l1_start_with_patterns_all_over_the_image(norm: Norm, shape: tuple[int, int, int]):
    x = torch.full((5, *shape), 0.5)
    search = Square(norm, 0.3, iterations=5)
    state = search.begin(Victim(linear(shape)), Task(torch.arange(5), x, torch.zeros(5).long(), x, 0))
    delta = state["adversarial"] - x
    side = max(min(shape[1:]) // 5, 1)
    whole = (shape[1] // side * side) * (shape[2] // side * side)
    if norm == "l2":
        assert torch.allclose(norm_of(delta, "l2"), torch.full((5,), 0.3), atol=1e-5)
        assert ((delta != 0).sum((2, 3)) == whole).all()
    assert float(norm_of(delta, norm).max()) <= 0.3
    assert not torch.equal(delta[0], delta[1])


@pytest.mark.parametrize("norm", NORMS)
def test_result_depends_on_nothing_but_the_sample(norm: Norm, classifier, images):
    ids, x, y = (part[:40] for part in images)
    search = Square(norm, RADIUS[norm], iterations=80)
    whole = attack(classifier, search, x, y, ids)
    assert 0 < int(fooled(classifier, whole.adversarial, y).sum()) < 40
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    others = {
        "refilled batches": attack(classifier, search, x, y, ids, batch=7),
        "permuted": attack(classifier, search, x[order], y[order], ids[order], batch=16),
        "alone": attack(classifier, search, x[3:4], y[3:4], ids[3:4]),
    }
    rows = {"refilled batches": torch.arange(40), "permuted": order, "alone": torch.tensor([3])}
    for name, other in others.items():
        expected = whole.adversarial[rows[name]]
        same = (other.adversarial - expected).flatten(1).abs().amax(1) < 1e-4
        # A margin that is the same to rounding may fall either way: then one search takes another turn.
        assert int((~same).sum()) <= 1, name
        assert int((other.step != whole.step[rows[name]]).sum()) <= 1, name


@pytest.mark.parametrize("norm", NORMS)
def test_broken_is_broken_and_the_best_margin_never_rises(norm: Norm, classifier, images):
    ids, x, y = images
    search, victim = Square(norm, RADIUS[norm], iterations=200), Victim(classifier)
    with torch.inference_mode():
        state = search.begin(victim, Task(ids, x, y, y, 0))
        for _ in range(200):
            before = state["margin"].clone()
            kept, was = state["adversarial"].clone(), state["broken"].clone()
            state = search.step(victim, state)
            assert bool((state["margin"] <= before).all())
            assert torch.equal(state["adversarial"][was], kept[was])
        scored = victim.margins(state["adversarial"], y)
    assert torch.allclose(scored, state["margin"], atol=1e-4)
    assert torch.equal(state["broken"], fooled(classifier, state["adversarial"], y))
    assert bool((state["broken_at"] <= 200).all())
    assert 0 < int(state["broken"].sum()) < len(x)


@pytest.mark.parametrize("norm", NORMS)
def test_counts_are_exact_and_no_sample_gets_more_or_less_than_its_queries(norm: Norm, classifier, images):
    ids, x, y = images
    y = classifier(x).argmax(1)
    model = Counting(classifier)
    found = attack(model, Square(norm, RADIUS[norm], iterations=120), x, y, ids, batch=16)
    assert int(found.forwards.sum()) == model.images
    assert int(found.backwards.sum()) == 0
    robust = ~fooled(classifier, found.adversarial, y)
    assert bool((found.step[robust] == 120).all())
    if norm != "linf":
        # a sample that its start breaks may sit through one step of its batch
        assert torch.equal(found.forwards[found.step > 0], found.step[found.step > 0] + 1)
    else:
        assert bool((found.forwards <= found.step + 1).all())


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 3, 7), (2, 6, 5)])
def test_skipping_queries_whose_answer_is_known_changes_nothing_but_the_number_of_forwards(
    shape: tuple[int, int, int],
):
    """ahead=1 asks every query; a window that repeats after a change of size or of the best image is asked again."""
    model, x = linear(shape, scale=0.5), pixels(12, shape)
    y = model(x).argmax(1)
    every = attack(model, Square("linf", 0.05, iterations=400, ahead=1), x, y)
    skipped = attack(model, Square("linf", 0.05, iterations=400, ahead=16), x, y)
    assert torch.equal(every.step, skipped.step)
    assert torch.equal(every.adversarial, skipped.adversarial)
    assert torch.equal(every.forwards, every.step + 1)
    robust = ~fooled(model, every.adversarial, y)
    assert int(robust.sum()) > 3
    assert bool((skipped.forwards[robust] < 0.75 * every.forwards[robust]).all())


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 2, 1), (5, 4, 4), (20, 3, 3), (70, 2, 2)])
@pytest.mark.parametrize("norm", NORMS)
def test_images_of_odd_sizes_and_many_channels(norm: Norm, shape: tuple[int, int, int]):
    model, x = linear(shape, classes=2), pixels(4, shape)
    y = model(x).argmax(1)
    found = attack(model, Square(norm, RADIUS[norm], iterations=30), x, y)
    assert bool(torch.isfinite(found.adversarial).all())
    assert float(norm_of(found.adversarial - x, norm).max()) <= RADIUS[norm] * (1 + 1e-6)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_not_finite_are_no_success_and_spoil_no_other_sample(norm: Norm, poison: float):
    inner, x = linear((1, 6, 6)), pixels(8, (1, 6, 6))
    y = inner(x).argmax(1)

    class Poisoned(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            logits = inner(images)
            marked = (images[:, 0, 0, 0] - x[0, 0, 0, 0]).abs() < 1e-9
            return torch.where(marked[:, None], torch.full_like(logits, poison), logits)

    x[1:, 0, 0, 0] = 0.9
    x[0, 0, 0, 0] = 0.0
    radius = RADIUS[norm] / 3
    clean = attack(inner, Square(norm, radius, iterations=60), x, y)
    found = attack(Poisoned(), Square(norm, radius, iterations=60), x, y)
    assert bool(torch.isfinite(found.adversarial).all())
    assert torch.equal(found.adversarial[1:], clean.adversarial[1:])


def test_a_search_leaves_when_it_is_broken_at_the_start():
    x = pixels(6, (1, 6, 6))
    found = attack(Constant(), Square("linf", 0.1, iterations=50), x, torch.ones(6, dtype=torch.int64))
    assert found.step.tolist() == [0] * 6
    assert found.forwards.tolist() == [1] * 6


def test_norm_without_windows_is_refused():
    with pytest.raises(UserError, match="give linf, l2 or l1"):
        Square("none", 0.1)


def reference_accuracy(model: nn.Module, x: Tensor, y: Tensor, norm: Norm, eps: float, queries: int) -> int:
    """Most samples that survive the reference over two seeds."""
    survivors = []
    for seed in range(2):
        reference = SquareAttack(
            model,
            norm=REFERENCE[norm],
            eps=eps,
            n_queries=queries,
            seed=seed,
            resc_schedule=False,
            device="cpu",
        )
        with torch.random.fork_rng(), contextlib.redirect_stdout(io.StringIO()):
            candidates = reference.perturb(x.clone(), y.clone())
        survivors.append(int((~fooled(model, candidates, y)).sum()))
    return max(survivors)


def zoo_model(name: str) -> nn.Module:
    return load_model(find_model(name, zoo_entries())).module.eval().requires_grad_(False)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", slow_but(["digits-at"], ["trained", "digits-at"]))
def test_as_strong_as_the_reference(norm: Norm, name: str, classifier, digits):
    model = classifier if name == "trained" else zoo_model(name)
    rows = torch.randperm(len(digits.test), generator=torch.Generator().manual_seed(0))[:60]
    x, y = digits.test.x(rows), digits.test.labels[rows]
    right = ~fooled(model, x, y)
    x, y, ids = x[right], y[right], digits.test.ids[rows][right]
    radius = RADIUS[norm] if name == "trained" else {"linf": 0.25, "l2": 1.0, "l1": 4.0}[norm]
    torch.set_flush_denormal(True)  # denormal weights of the zoo's models make a forward twenty times slower
    try:
        reference = reference_accuracy(model, x, y, norm, radius, 100)
        found = attack(model, Square(norm, radius, iterations=100), x, y, ids)
    finally:
        torch.set_flush_denormal(False)
    ours = int((~fooled(model, found.adversarial, y)).sum())
    assert 0 < ours < len(x)
    assert ours <= reference + 2
