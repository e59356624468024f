"""robbench's AutoAttack against the reference package, in one process: verdicts, times, and their lower bound
(floor)."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from robbench.attacks import Outcome, Victim, build_attack
from robbench.attacks.search.inner import attack_mode
from robbench.attacks.trust.context import full_precision
from robbench.benchmarks.pages import head, page, plain, spread, table
from robbench.benchmarks.timing import Tell, time_call
from robbench.data import Dataset, sample_ids
from robbench.models.loading import LoadedModel
from robbench.specs import resolve_attack, threat_models

BATCHES = (32, 64, 128, 256, 512, 1000)  # batch sizes tried for the cheapest model call
OURS, REFERENCE = "robbench", "pyautoattack"


@dataclass(frozen=True)
class Contest:
    """A comparison; both engines compute in fp32.

    Attributes:
        attack: of robbench; its reference is "aa-reference" with the same ending.
        n: test images.
        seeds: each engine attacks the same images once per seed; the order of the two alternates.
        sample_seed: of the drawn images.
        batch_size: images per batch.
        epsilon: None for the data set's.
    """

    attack: str
    n: int
    seeds: tuple[int, ...]
    sample_seed: int = 0
    batch_size: int = 256
    epsilon: float | None = None

    @property
    def reference(self) -> str:
        """Name of the attack of the reference package."""
        return "aa-reference" + self.attack.removeprefix("aa")


@dataclass(frozen=True)
class Parity:
    """Result for one model.

    Attributes:
        model: its name.
        attack: of robbench.
        n: number of attacked images.
        clean: number of images classified correctly before the attack.
        robust: number of robust images, per seed, by engine.
        only_ours_breaks: ids of images that every seed of robbench broke and none of the reference.
        only_reference_breaks: the converse.
        seconds: per seed, by engine.
        floor_seconds: `floor` of calls of the model itself in fp32.
        least_seconds: `floor` of the cheapest calls that a search may make.
        forwards: of robbench's first seed, over all images, including those that a backward needs.
        backwards: of the same.
        threads: CPU threads.
    """

    model: str
    attack: str
    n: int
    clean: int
    robust: dict[str, list[int]]
    only_ours_breaks: list[int]
    only_reference_breaks: list[int]
    seconds: dict[str, list[float]]
    floor_seconds: float
    least_seconds: float
    forwards: int
    backwards: int
    threads: int

    @property
    def excess(self) -> int:
        """Number of images by which robbench's robust accuracy (largest over seeds) exceeds the reference's."""
        return max(self.robust[OURS]) - max(self.robust[REFERENCE])

    @property
    def speedup(self) -> float:
        """Reference's median time over ours."""
        return median(self.seconds[REFERENCE]) / median(self.seconds[OURS])

    @property
    def over_floor(self) -> float:
        """robbench's median time over `floor_seconds`."""
        return median(self.seconds[OURS]) / self.floor_seconds

    @property
    def over_least(self) -> float:
        """robbench's median time over `least_seconds`."""
        return median(self.seconds[OURS]) / self.least_seconds


def compare(
    model: LoadedModel, dataset: Dataset, contest: Contest, device: torch.device, tell: Tell
) -> Parity:
    """Run both engines on the same seeded samples of the test split, once per seed each."""
    ids = sample_ids(dataset.test, min(contest.n, len(dataset.test)), contest.sample_seed)
    x, y = dataset.test.by_ids(ids)
    known = threat_models()
    names = {REFERENCE: contest.reference, OURS: contest.attack}
    attacks = {
        engine: build_attack(resolve_attack(name, model.card.dataset, known, contest.epsilon))
        for engine, name in names.items()
    }
    outcomes: dict[str, list[Outcome]] = {engine: [] for engine in attacks}
    seconds: dict[str, list[float]] = {engine: [] for engine in attacks}
    for number, seed in enumerate(contest.seeds):
        order = list(attacks)
        for engine in order[::-1] if number % 2 else order:
            victim = Victim(model.module, device, contest.batch_size)
            evaluate = partial(
                attacks[engine].evaluate, victim, torch.tensor(ids), x, y, seed, contest.batch_size
            )
            outcome, spent = time_call(evaluate, device)
            outcomes[engine].append(outcome)
            seconds[engine].append(spent)
            robust = int(outcome.robust.sum())
            tell(f"{model.card.name}, {engine}, seed {seed}: {robust} robust, {spent:.1f} s")
    return _parity(model, contest, ids, x, outcomes, seconds, device)


def _parity(
    model: LoadedModel,
    contest: Contest,
    ids: Sequence[int],
    x: Tensor,
    outcomes: dict[str, list[Outcome]],
    seconds: dict[str, list[float]],
    device: torch.device,
) -> Parity:
    robust = {name: torch.stack([o.robust for o in found]) for name, found in outcomes.items()}
    ours, reference = robust[OURS], robust[REFERENCE]
    numbers = torch.tensor(ids)
    first = outcomes[OURS][0]
    forwards, backwards = int(first.forwards.sum()), int(first.backwards.sum())
    return Parity(
        model=model.card.name,
        attack=contest.attack,
        n=len(ids),
        clean=int((first.clean_margins > 0).sum()),
        robust={name: found.sum(1).tolist() for name, found in robust.items()},
        only_ours_breaks=numbers[~ours.any(0) & reference.all(0)].tolist(),
        only_reference_breaks=numbers[ours.all(0) & ~reference.any(0)].tolist(),
        seconds=seconds,
        floor_seconds=floor(model.module, x, forwards, backwards, device),
        least_seconds=floor(model.module, x, forwards, backwards, device, lean=True),
        forwards=forwards,
        backwards=backwards,
        threads=torch.get_num_threads(),
    )


def floor(
    module: nn.Module,
    x: Tensor,
    forwards: int,
    backwards: int,
    device: torch.device,
    batches: Sequence[int] = BATCHES,
    lean: bool = False,
) -> float:
    """Least seconds of so many model calls: the best of `batches` and of weights in the usual and in channels_last
    format, fp32, each call measured alone. forwards includes those that a backward needs.

    lean: also try the lean network that a search may call.
    """
    victim = Victim(module, device)
    with attack_mode(module), full_precision(), victim.lean_search(x):
        networks: list[Callable[[Tensor], Tensor]] = [
            module,
            deepcopy(module).to(memory_format=torch.channels_last),
            *([victim.differentiable] if lean else []),
        ]
        calls = [(network, _batch(x, batch, device)) for batch in batches for network in networks]
        both = min(_cost(network, images, True) for network, images in calls)
        alone = min(_cost(network, images, False) for network, images in calls)
    return backwards * both + (forwards - backwards) * alone


def _batch(x: Tensor, size: int, device: torch.device) -> Tensor:
    return x.repeat(-(-size // len(x)), 1, 1, 1)[:size].to(device).contiguous()


def _cost(
    network: Callable[[Tensor], Tensor], x: Tensor, gradient: bool, least_seconds: float = 0.05
) -> float:
    """Seconds per image of the fastest of several calls."""

    def call() -> None:
        with torch.set_grad_enabled(gradient):
            if not gradient:
                network(x)
                return
            leaf = x.detach().requires_grad_(True)
            torch.autograd.grad(network(leaf).sum(), leaf)

    call()
    times: list[float] = []
    while sum(times) < least_seconds or len(times) < 3:
        times.append(time_call(call, x.device)[1])
    return min(times) / len(x)


def report(found: Sequence[Parity], contest: Contest, command: str) -> dict[str, Any]:
    """Everything as plain values, for JSON."""
    content = plain(command, contest, {}, "models", found)
    for row, one in zip(content["models"], found, strict=True):
        row |= {name: getattr(one, name) for name in ("excess", "speedup", "over_floor", "over_least")}
    return content


PARITY = (
    *(
        "model",
        "n",
        "clean",
        "robbench, by seed",
        "reference, by seed",
        "above the reference's largest (samples)",
    ),
    *("broken by every robbench run and no reference run", "the other way round"),
)
SPEED = (
    *("model", "threads", "fp32 floor", "search floor", "robbench", "reference"),
    *("robbench / fp32 floor", "robbench / search floor", "reference / robbench"),
)


def markdown(found: Sequence[Parity], contest: Contest, command: str) -> str:
    """The parity table and the speed table."""
    at = "" if contest.epsilon is None else f", epsilon {contest.epsilon:g}"
    return page(
        [
            *head(f"{contest.attack} against the reference package{at}", command),
            f"Test images drawn by seed {contest.sample_seed}, each engine once per seed "
            f"({', '.join(map(str, contest.seeds))}), the order of the two alternating, in one process. "
            "Both search in fp32; verdicts are fp32 forwards of the model. "
            "Robust accuracy in percent.",
            "",
            *table(PARITY, map(_parity_row, found)),
            "",
            "Seconds (of one CPU thread: spent computing), median over seeds [least, most]. Floor: this run's own "
            "forwards and backwards, each at the cost it has alone at its best batch size and weight format; of the "
            "model itself in fp32, and of the cheapest call a search may make: the model itself or robbench's lean "
            "network, on which no verdict rests.",
            "",
            *table(SPEED, map(_speed_row, found)),
        ]
    )


def _parity_row(p: Parity) -> list[str]:
    def percent(count: int) -> str:
        return f"{100 * count / p.n:.2f}"

    robust = [" / ".join(map(percent, p.robust[name])) for name in (OURS, REFERENCE)]
    broken = [", ".join(map(str, ids)) or "none" for ids in (p.only_ours_breaks, p.only_reference_breaks)]
    return [p.model, str(p.n), percent(p.clean), *robust, str(p.excess), *broken]


def _speed_row(p: Parity) -> list[str]:
    floors = [f"{p.floor_seconds:.1f}", f"{p.least_seconds:.1f}"]
    spent = [spread([min(s), median(s), max(s)], 1) for s in (p.seconds[OURS], p.seconds[REFERENCE])]
    ratios = [f"{p.over_floor:.2f}", f"{p.over_least:.2f}", f"{p.speedup:.2f}"]
    return [p.model, str(p.threads), *floors, *spent, *ratios]
