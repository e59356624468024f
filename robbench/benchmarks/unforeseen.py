"""Elastic and JPEG attacks against a plain loop in the style of the public code, in one process.

Both start from the same variables and make all sign steps on every image (early stopping off). At the first and the
last variables of a search both must render the same images and find the same gradient of the loss, up to rounding; else
no ratio is given. The last iterates of the two need not be equal: where a gradient is near 0 rounding decides its sign,
and the paths through a random network part, the sooner the larger the images are. Their difference and the verdicts are
printed. Labels are the random network's own predictions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from robbench.attacks import Victim, build_attack
from robbench.attacks.base import Task
from robbench.attacks.search.decision import margins
from robbench.attacks.search.geometry import SampleNoise
from robbench.attacks.search.inner import attack_mode
from robbench.attacks.search.rendered import VARIABLES
from robbench.attacks.trust.context import full_precision
from robbench.attacks.unforeseen.base import RenderedAttack
from robbench.benchmarks.models import random_classifier
from robbench.benchmarks.pages import Verdicts, head, page, plain
from robbench.benchmarks.pgd import OURS
from robbench.benchmarks.timing import Tell, ignore, interleave, processor
from robbench.benchmarks.unforeseen_peers import PEERS, Render
from robbench.core.errors import UserError
from robbench.specs import resolve_attack, threat_models

PLAIN = "plain loop"
BUDGETS_OF = "cifar10"
PIXEL = 1e-3  # difference from which a pixel counts as another one
UNEQUAL = 1e-3  # largest share of unequal pixels of one rendering
GRADIENT_GAP = (
    1e-2  # largest relative difference of its gradients: rounding moves pixels across kinks of the network
)
CPU = torch.device("cpu")
Runs = dict[str, Callable[[], Tensor]]


class Sharp(nn.Module):
    """A network with its logits times 30: a random one is so undecided that robbench's searches would temper it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.module(x)
        return 30.0 * logits


@dataclass(frozen=True)
class Contest:
    """A comparison.

    Attributes:
        classifier: a registered architecture, with random weights.
        n: random images, in one batch.
        side: of the images, of three channels; a multiple of 16.
        steps: sign steps of CIFAR-10's budget / sqrt(steps).
        rounds: measured runs per implementation.
    """

    classifier: str = "digits-cnn"
    n: int = 64
    side: int = 32
    steps: int = 40
    rounds: int = 5

    def __post_init__(self) -> None:
        if self.side % 16:
            raise UserError(f"--side {self.side}: the plain JPEG takes multiples of 16; give 32 or 224")


@dataclass
class Result:
    """Both comparisons of one attack.

    Attributes:
        attack: its name.
        epsilon: its budget.
        device: name of the processor.
        threads: CPU threads.
        stray: share of pixels of the last iterates that differ by more than `PIXEL`.
        unequal: the same of one rendering; gradient_gap: relative difference of its gradients, in L2.
        work: the attack, all steps for every image.
        rendering: rendering and its gradient in the variables alone, as often as the attack has steps.
    """

    attack: str
    epsilon: float
    device: str
    threads: int
    stray: float
    unequal: float
    gradient_gap: float
    work: Verdicts
    rendering: Verdicts


def compare(name: str, contest: Contest, tell: Tell = ignore, peer: Render | None = None) -> Result:
    """Parity of both implementations of the attack `name`, then their times. peer: None for that of `PEERS`."""
    shape = (3, contest.side, contest.side)
    network, x, y = random_classifier(contest.classifier, contest.n, shape)
    module = Sharp(network).eval()
    attack, victim = _attack(name, contest), Victim(module, CPU, contest.n)
    render = peer or PEERS[name]
    with attack_mode(module), full_precision():
        task = Task(torch.arange(contest.n), x, y, y, 0, contest.n)
        runs: Runs = {
            OURS: lambda: _search(attack, victim, task),
            PLAIN: lambda: _plain_loop(attack, module, x, y, render),
        }
        last = _last_variables(attack, module, x, y, render)
        images = {OURS: runs[OURS](), PLAIN: _clipped_image(render, x, last)}
        scores = {who: margins(victim.clean_logits(found), y) for who, found in images.items()}
        stray = _share_of_others(images[OURS], images[PLAIN])
        unequal, gap = _compare_renderings(attack, module, x, y, render, last)
        refused = ""
        if not unequal <= UNEQUAL:
            refused = f"{100 * unequal:.1f} % of the pixels of a rendering differ: no ratio is printed"
        elif not gap <= GRADIENT_GAP:
            refused = f"the gradients of a rendering differ by {100 * gap:.1f} %: no ratio is printed"
        robust = {who: int((score > 0).sum()) for who, score in scores.items()}
        parts = Verdicts(robust, refused), Verdicts(robust, refused)
        for part, timed in zip(parts, (runs, _renderings(attack, x, y, render)), strict=True):
            if not refused:
                part.add_times(interleave(timed, contest.rounds, CPU, tell), OURS)
    epsilon = float(attack.spec.epsilon or 0.0)
    return Result(name, epsilon, processor(CPU), torch.get_num_threads(), stray, unequal, gap, *parts)


def _share_of_others(one: Tensor, other: Tensor) -> float:
    return float(((one - other).abs() > PIXEL).float().mean())


def _compare_renderings(
    attack: RenderedAttack, module: nn.Module, x: Tensor, y: Tensor, render: Render, last: Tensor
) -> tuple[float, float]:
    """Largest share of pixels that differ, and largest relative difference of the gradients of the loss, at the start
    of the search and at the `last` variables of a plain loop."""
    space = attack.space()
    state = space.start(x, y, _start_noise(attack, x))
    ours: Render = lambda images, variables: space.render({**state, VARIABLES: variables})[0]  # noqa: E731
    shares, gaps = [], []
    for variables in (state[VARIABLES], last):
        (one, first), (other, second) = (
            _image_and_gradient(f, module, x, y, variables) for f in (ours, render)
        )
        shares.append(_share_of_others(one, other))
        gaps.append(float((first - second).norm() / first.norm()))
    return max(shares), max(gaps)


def _image_and_gradient(
    render: Render, module: nn.Module, x: Tensor, y: Tensor, variables: Tensor
) -> tuple[Tensor, Tensor]:
    leaf = variables.detach().requires_grad_(True)
    image = render(x, leaf)
    loss = nn.functional.cross_entropy(module(image), y, reduction="sum")
    return image.detach(), torch.autograd.grad(loss, leaf)[0]


def _start_noise(attack: RenderedAttack, x: Tensor) -> SampleNoise:
    return SampleNoise(0, attack.spec.name, torch.arange(len(x)), 0, x.device)


def _renderings(attack: RenderedAttack, x: Tensor, y: Tensor, render: Render) -> Runs:
    """A rendering and its gradient in the variables, as often as the attack has steps; each was called once."""
    space = attack.space()
    state = space.start(x, y, _start_noise(attack, x))

    def often(image: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            for _ in range(attack.parameters.steps):
                variables = state[VARIABLES].detach().requires_grad_(True)
                (gradient,) = torch.autograd.grad(image(variables).square().sum(), variables)
            return gradient

        return run

    runs = {
        OURS: often(lambda v: space.render({**state, VARIABLES: v})[0]),
        PLAIN: often(lambda v: render(x, v)),
    }
    for run in runs.values():
        run()
    return runs


def _attack(name: str, contest: Contest) -> RenderedAttack:
    spec = resolve_attack(name, BUDGETS_OF, threat_models(), steps=contest.steps)
    changed = spec.model_copy(update={"parameters": {**spec.parameters, "early_stop": False}})
    attack = build_attack(changed)
    assert isinstance(attack, RenderedAttack)
    return attack


def _search(attack: RenderedAttack, victim: Victim, task: Task) -> Tensor:
    with victim.lean_search(task.x):
        return attack.search(victim, task).adversarial


def _plain_loop(attack: RenderedAttack, module: nn.Module, x: Tensor, y: Tensor, render: Render) -> Tensor:
    """All steps of the attack as a plain loop, from the attack's own start."""
    return _clipped_image(render, x, _last_variables(attack, module, x, y, render))


def _clipped_image(render: Render, x: Tensor, variables: Tensor) -> Tensor:
    with torch.no_grad():
        return render(x, variables).clamp(0.0, 1.0)


def _last_variables(
    attack: RenderedAttack, module: nn.Module, x: Tensor, y: Tensor, render: Render
) -> Tensor:
    space, epsilon = attack.space(), float(attack.spec.epsilon or 0.0)
    variables = space.start(x, y, _start_noise(attack, x))[VARIABLES]
    for _ in range(attack.parameters.steps):
        _, gradient = _image_and_gradient(render, module, x, y, variables)
        variables = (variables.detach() + space.step_size * gradient.sign()).clamp(-epsilon, epsilon)
    return variables


def report(found: Sequence[Result], contest: Contest, command: str) -> dict[str, Any]:
    """Everything as plain values, for JSON."""
    return plain(command, contest, {}, "attacks", found)


def markdown(found: Sequence[Result], contest: Contest, command: str) -> str:
    """One section per attack, one table per comparison."""
    lines = head("Elastic and JPEG against a plain loop", command)
    lines += [
        f"{contest.classifier} with random weights, {contest.n} random images of {contest.side} x {contest.side}",
        f"pixels in one batch, {contest.steps} sign steps for every image, {contest.rounds} interleaved rounds in one",
        "process; median [quartiles]. Seconds (of one CPU thread: spent computing). Ratio: to robbench's time of the",
        "same round; above 1 is slower than robbench. `robbench/benchmarks/unforeseen.py` says what is compared.",
    ]
    for one in found:
        lines += [
            "",
            f"## {one.attack}, epsilon {one.epsilon:g}",
            "",
            f"{one.device}, {one.threads} thread(s). Of one rendering {100 * one.unequal:.2g} % of the pixels differ, "
            f"its gradients by {100 * one.gradient_gap:.2g} %; of the last iterates {100 * one.stray:.2g} % of the "
            f"pixels.",
        ]
        lines += ["", "Equal work: the attack alone, all steps for every image.", "", *one.work.table(3)]
        lines += ["", "Rendering and its gradient alone, as often.", "", *one.rendering.table(3)]
    return page(lines)
