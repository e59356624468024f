"""robbench's AutoAttack against the reference package: verdicts, distances to the floor, times, in one process."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from robbench.attacks import Attack, Outcome, Victim, build_attack
from robbench.attacks.inner import attacked
from robbench.attacks.victim import full_precision
from robbench.bench.timing import now
from robbench.data import Dataset, sample_ids
from robbench.device import versions
from robbench.models.loading import LoadedModel
from robbench.precision import SearchPrecision
from robbench.specs import resolve_attack, threat_models

BATCHES = (32, 64, 128, 256, 512, 1000)  # where the floor looks for the cheapest model call
OURS, REFERENCE = "robbench", "pyautoattack"


@dataclass(frozen=True)
class Contest:
    """What is compared. attack: of robbench; its reference is "aa-reference" with the same ending.

    seeds: each engine attacks the same samples once a seed; the order of the two alternates. sample_seed: draws them.
    precision: of robbench's searches; the reference always computes in fp32.
    """

    attack: str
    n: int
    seeds: tuple[int, ...]
    sample_seed: int = 0
    batch_size: int = 256
    precision: SearchPrecision = "fp32"

    @property
    def reference(self) -> str:
        return "aa-reference" + self.attack.removeprefix("aa")


@dataclass(frozen=True)
class Parity:
    """Result for one model. robust: samples found robust a seed; ever_*: ids that any (no) seed broke and the other
    engine's did not. seconds: a seed. floor_seconds, least_seconds: `floor` of calls of the model itself in fp32, and
    of the cheapest calls a search may make.

    excess: how far our robust accuracy (worst over seeds) lies above the reference's largest, in samples; at most 0
    means never above.
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
        return max(self.robust[OURS]) - max(self.robust[REFERENCE])

    @property
    def speedup(self) -> float:
        """Reference's median time over ours."""
        return median(self.seconds[REFERENCE]) / median(self.seconds[OURS])

    @property
    def over_floor(self) -> float:
        return median(self.seconds[OURS]) / self.floor_seconds

    @property
    def over_least(self) -> float:
        return median(self.seconds[OURS]) / self.least_seconds


def compare(
    model: LoadedModel, dataset: Dataset, contest: Contest, device: torch.device, tell: Callable[[str], None]
) -> Parity:
    """Both engines on the same seeded samples of the test split, once a seed each."""
    return compare_all(model, dataset, [contest], device, tell)[0]


def compare_all(
    model: LoadedModel,
    dataset: Dataset,
    contests: Sequence[Contest],
    device: torch.device,
    tell: Callable[[str], None],
) -> list[Parity]:
    """`compare` in several precisions, which share the runs of the reference. contests: differ in precision alone."""
    first = contests[0]
    ids = sample_ids(dataset.test, min(first.n, len(dataset.test)), first.sample_seed)
    x, y = dataset.test.by_ids(ids)
    known = threat_models()
    ours = build_attack(resolve_attack(first.attack, model.card.dataset, known))
    reference = build_attack(resolve_attack(first.reference, model.card.dataset, known))
    entrants = [(OURS, contest.precision, ours) for contest in contests]
    outcomes: dict[tuple[str, SearchPrecision], list[Outcome]] = {}
    seconds: dict[tuple[str, SearchPrecision], list[float]] = {}
    for number, seed in enumerate(first.seeds):
        order: list[tuple[str, SearchPrecision, Attack]] = [(REFERENCE, "fp32", reference), *entrants]
        for name, precision, attack in order[::-1] if number % 2 else order:
            victim = Victim(model.module, device, first.batch_size, precision)
            outcome, spent = _timed(attack, victim, ids, x, y, seed, first.batch_size)
            outcomes.setdefault((name, precision), []).append(outcome)
            seconds.setdefault((name, precision), []).append(spent)
            robust = int(outcome.robust.sum())
            tell(f"{model.card.name}, {name} {precision}, seed {seed}: {robust} robust, {spent:.1f} s")
    return [
        _parity(
            model,
            contest,
            ids,
            x,
            {OURS: outcomes[OURS, contest.precision], REFERENCE: outcomes[REFERENCE, "fp32"]},
            {OURS: seconds[OURS, contest.precision], REFERENCE: seconds[REFERENCE, "fp32"]},
            device,
        )
        for contest in contests
    ]


def _timed(
    attack: Attack, victim: Victim, ids: Sequence[int], x: Tensor, y: Tensor, seed: int, batch_size: int
) -> tuple[Outcome, float]:
    begun = now(victim.device)
    outcome = attack.evaluate(victim, torch.tensor(ids), x, y, seed, batch_size)
    return outcome, now(victim.device) - begun


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
        least_seconds=floor(model.module, x, forwards, backwards, device, searches=contest.precision),
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
    searches: SearchPrecision | None = None,
) -> float:
    """Seconds that so many model calls cost at their cheapest: the best of `batches` and of weights in the usual and
    in channels_last format, fp32, each call measured alone. forwards includes those that a backward needs.

    searches: also try what a search in this precision may call, of which verdicts are not made: the model in that
    precision, and the lean network.
    """
    victim = Victim(module, device, precision=searches or "fp32")
    with attacked(module), full_precision(), victim.searched_leanly(x):
        own = (module, deepcopy(module).to(memory_format=torch.channels_last))
        networks: list[Callable[[Tensor], Tensor]] = list(own)
        if searches is not None:
            low = () if searches == "fp32" else own
            networks += [Victim(network, device, precision=searches).differentiable for network in low]
            networks.append(victim.differentiable)
        calls = [(network, _batch(x, batch, device)) for batch in batches for network in networks]
        both = min(_cost(network, images, True) for network, images in calls)
        alone = min(_cost(network, images, False) for network, images in calls)
    return backwards * both + (forwards - backwards) * alone


def _batch(x: Tensor, size: int, device: torch.device) -> Tensor:
    return x.repeat(-(-size // len(x)), 1, 1, 1)[:size].to(device).contiguous()


def _cost(
    network: Callable[[Tensor], Tensor], x: Tensor, gradient: bool, least_seconds: float = 0.05
) -> float:
    """Seconds an image: the fastest of several calls."""

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
        begun = now(x.device)
        call()
        times.append(now(x.device) - begun)
    return min(times) / len(x)


def report(found: Sequence[Parity], contest: Contest, command: str) -> dict[str, Any]:
    """Everything as plain values, for JSON."""
    rows = [
        asdict(one) | {name: getattr(one, name) for name in ("excess", "speedup", "over_floor", "over_least")}
        for one in found
    ]
    return {"command": command, "contest": asdict(contest), "versions": versions(), "models": rows}


def markdown(found: Sequence[Parity], contest: Contest, command: str) -> str:
    """The parity table and the speed table."""
    lines = [
        f"# {contest.attack} against the reference package" + _in_precision(contest),
        "",
        f"    {command}",
        "",
        f"Test images drawn by seed {contest.sample_seed}, each engine once a seed "
        f"({', '.join(map(str, contest.seeds))}), the order of the two alternating, in one process. "
        f"robbench searches in {contest.precision}, the reference in fp32; verdicts are fp32 forwards of the model. "
        "Robust accuracy in percent.",
        "",
        "| model | n | clean | robbench, by seed | reference, by seed | above the reference's largest (samples) "
        "| broken by every robbench run and no reference run | the other way round |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for p in found:
        cells = [p.model, str(p.n), _percent(p.clean, p.n)]
        cells += [" / ".join(_percent(k, p.n) for k in p.robust[name]) for name in (OURS, REFERENCE)]
        cells += [str(p.excess), _listed(p.only_ours_breaks), _listed(p.only_reference_breaks)]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "Seconds (of one CPU thread: spent computing), median over seeds [least, most]. Floor: this run's own forwards "
        "and backwards, each at the cost it has alone at its best batch size and weight format; of the model itself in "
        "fp32, and of the cheapest call a search may make: the model itself"
        f"{_or_in_precision(contest)}, or robbench's lean network in {contest.precision}, on which no verdict rests.",
        "",
        "| model | threads | fp32 floor | search floor | robbench | reference | robbench / fp32 floor "
        "| robbench / search floor | reference / robbench |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for p in found:
        cells = [p.model, str(p.threads), f"{p.floor_seconds:.1f}", f"{p.least_seconds:.1f}"]
        cells += [_spread(p.seconds[name]) for name in (OURS, REFERENCE)]
        cells += [f"{p.over_floor:.2f}", f"{p.over_least:.2f}", f"{p.speedup:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _in_precision(contest: Contest) -> str:
    return "" if contest.precision == "fp32" else f", searches in {contest.precision}"


def _or_in_precision(contest: Contest) -> str:
    return "" if contest.precision == "fp32" else f" in fp32 or {contest.precision}"


def _percent(count: int, n: int) -> str:
    return f"{100 * count / n:.2f}"


def _listed(ids: Sequence[int]) -> str:
    return ", ".join(map(str, ids)) or "none"


def _spread(values: Sequence[float]) -> str:
    return f"{median(values):.1f} [{min(values):.1f}, {max(values):.1f}]"
