"""robbench's PGD against other libraries, in one process: verdicts first, then times.

Two comparisons, both from the clean image, so that all have the same start:
* equal work: the attack alone, all steps for every image (early_stop off); robbench's as in a run (on a CPU including
the
  construction of its lean network). All verdicts on the last iterates must agree, except near ties (both margins below
  `NEAR_TIE`).
* equal verdict: from images to the list of robust ones. robbench: `evaluate` as in a run, with early stopping and all
  checks. The others: a forward of the clean images, their attack, a forward of its images. No image that a peer breaks
  may be robust for robbench, except near ties; the converse may happen, since any iterate counts.
Where either is violated no ratio is given, for any peer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from robbench.attacks import Attack, Victim, build_attack
from robbench.attacks.base import Task
from robbench.attacks.search.decision import margins
from robbench.attacks.search.inner import attack_mode
from robbench.attacks.trust.context import full_precision
from robbench.attacks.victim import chunks
from robbench.benchmarks.models import load_classifiers, random_classifier
from robbench.benchmarks.pages import Verdicts, head, missing, page, plain
from robbench.benchmarks.pgd_peers import DISTRIBUTIONS, Build, Pgd, Search, build_peers
from robbench.benchmarks.timing import Tell, ignore, interleave, processor
from robbench.core.counting import count_noun
from robbench.core.device import resolve_device
from robbench.data import sample_ids
from robbench.specs import ResolvedAttack, resolve_attack, threat_models

OURS = "robbench"
NEAR_TIE = 1e-4  # margins that rounding decides
ROUNDING = 1e-5  # by which an image may leave box or ball


@dataclass(frozen=True)
class Subject:
    """A model, images and budget.

    Attributes:
        name: as shown.
        module: from images to logits, on `device`.
        x: images [n,C,H,W] in [0,1], on the CPU.
        y: labels [n], on the CPU.
        epsilon: radius of the Linf ball, of pixels in [0, 1].
        device: of all computations.
    """

    name: str
    module: nn.Module
    x: Tensor
    y: Tensor
    epsilon: float
    device: torch.device


RANDOM_EPSILON = 1 / 255  # with more, random networks have no robust images, and no verdicts to compare


def zoo_subjects(names: Sequence[str], n: int, epsilon: float | None = None, **places: Any) -> list[Subject]:
    """Zoo classifiers with n test images drawn by seed 0. epsilon: None for the data set's own. places: as for
    `load_classifiers`."""
    known, found = threat_models(), []
    for model, dataset, device in load_classifiers(names, **places):
        x, y = dataset.test.by_ids(sample_ids(dataset.test, min(n, len(dataset.test)), 0))
        budget = float(resolve_attack("pgd50", model.card.dataset, known, epsilon).epsilon or 0.0)
        found.append(Subject(model.card.name, model.module, x, y, budget, device))
    return found


def random_subjects(
    architectures: Sequence[str], n: int, epsilon: float | None = None, device: str = "auto"
) -> list[Subject]:
    """Networks with random weights on n random 3x32x32 images, labels their own predictions."""
    target = resolve_device(device)
    return [
        Subject(
            f"{name} (random weights)",
            *random_classifier(name, n),
            RANDOM_EPSILON if epsilon is None else epsilon,
            target,
        )
        for name in architectures
    ]


@dataclass(frozen=True)
class Contest:
    """steps: of epsilon/4. rounds: measured runs per implementation, after an unmeasured one."""

    steps: int = 40
    batch_size: int = 256
    rounds: int = 9

    def attack(self, epsilon: float, early_stop: bool) -> ResolvedAttack:
        """robbench's PGD with the numbers of this contest, whatever data set the images are from."""
        spec = resolve_attack("pgd50", "", threat_models(), epsilon=epsilon)
        changes = {"steps": self.steps, "start": "zero", "early_stop": early_stop}
        return spec.model_copy(update={"parameters": {**spec.parameters, **changes}})


@dataclass
class Result:
    """Both comparisons of one model.

    Attributes:
        model: its name.
        n: number of attacked images.
        epsilon: radius of the Linf ball, of pixels in [0, 1].
        device: name of the processor.
        threads: CPU threads.
        work: the attack alone, all steps for every image.
        verdict: from images to the robust ones.
        absent: peers that are not installed, and how to get them.
    """

    model: str
    n: int
    epsilon: float
    device: str
    threads: int
    work: Verdicts
    verdict: Verdicts
    absent: dict[str, str]


class Arena:
    """One model with all implementations. Use inside `attack_mode(module)`."""

    def __init__(self, subject: Subject, contest: Contest, peers: dict[str, Build] | None = None) -> None:
        self.subject, self.contest = subject, contest
        self.victim = Victim(subject.module, subject.device, contest.batch_size)
        self.x, self.y = subject.x.to(subject.device), subject.y.to(subject.device)
        logits = self.victim.clean_logits(subject.x)
        self.clean = (margins(logits, subject.y) > 0).to(subject.device)
        self.predictions = logits.argmax(1).to(subject.device)
        relative = contest.attack(subject.epsilon, False).parameters.get("relative_step_size", 0.25)
        pgd = Pgd(
            subject.epsilon,
            relative * subject.epsilon,
            contest.steps,
            contest.batch_size,
            classes=logits.shape[1],
        )
        self.peers, self.absent = build_peers(subject.module, pgd, subject.device, peers)

    def attack(self, early_stop: bool) -> Attack:
        """robbench's attack of the contest."""
        return build_attack(self.contest.attack(self.subject.epsilon, early_stop))

    def searches(self) -> dict[str, Callable[[], Tensor]]:
        """Functions that return adversarial images of the attack alone, all steps for every image, by name."""
        attack, ids = self.attack(early_stop=False), torch.arange(len(self.x))
        task = Task(ids, self.x, self.y, self.predictions, 0, self.contest.batch_size)

        def ours() -> Tensor:
            with self.victim.lean_search(self.x):
                return attack.search(self.victim, task).adversarial

        peers = {name: _bind(search, self.x, self.y) for name, search in self.peers.items()}
        return {OURS: ours, **peers}

    def judgements(self) -> dict[str, Callable[[], Tensor]]:
        """Functions that return whether each image is robust, [n] bool, by name."""
        attack, ids = self.attack(early_stop=True), torch.arange(len(self.x))

        def ours() -> Tensor:
            s, size = self.subject, self.contest.batch_size
            return attack.evaluate(self.victim, ids, s.x, s.y, seed=0, batch_size=size).robust

        def theirs(search: Search) -> Callable[[], Tensor]:
            return lambda: (self.margins(self.x) > 0) & (self.margins(search(self.x, self.y)) > 0)

        return {OURS: ours, **{name: theirs(search) for name, search in self.peers.items()}}

    def margins(self, images: Tensor) -> Tensor:
        """Margins [n] of images on the device, in batches."""
        rows = chunks(torch.arange(len(images)), self.contest.batch_size)
        return torch.cat([self.victim.margins(images[part], self.y[part]) for part in rows])


def _bind(search: Search, x: Tensor, y: Tensor) -> Callable[[], Tensor]:
    return lambda: search(x, y)


def compare(
    subject: Subject,
    contest: Contest,
    tell: Tell = ignore,
    peers: dict[str, Build] | None = None,
) -> Result:
    """Parity of all implementations, then both comparisons. peers: None for all of `PEERS`."""
    with attack_mode(subject.module), full_precision():
        arena = Arena(subject, contest, peers)
        images = {name: run().detach() for name, run in arena.searches().items()}
        scores = {name: arena.margins(found).cpu() for name, found in images.items()}
        judged = {name: run().cpu() for name, run in arena.judgements().items()}
        work = Verdicts({name: int((m > 0).sum()) for name, m in scores.items()})
        verdict = Verdicts({name: int(robust.sum()) for name, robust in judged.items()})
        work.refused = _inadmissible(arena, images) or disagreement(scores)
        verdict.refused = work.refused or _weaker(judged, scores)
        for found, runs in ((work, arena.searches()), (verdict, arena.judgements())):
            if not found.refused:
                found.add_times(interleave(runs, contest.rounds, subject.device, tell), OURS)
    return Result(
        subject.name,
        len(subject.x),
        subject.epsilon,
        processor(subject.device),
        torch.get_num_threads(),
        work,
        verdict,
        arena.absent,
    )


def _inadmissible(arena: Arena, images: dict[str, Tensor]) -> str:
    """The first implementation that left box or ball, which makes it incomparable; "" for none."""
    for name, found in images.items():
        beyond = float((found - arena.x).abs().max()) - arena.subject.epsilon
        outside = float(torch.maximum(-found, found - 1.0).max())
        if not max(beyond, outside) <= ROUNDING:
            return f"{name} leaves the box by {outside:.1e} or the ball by {beyond:.1e}: no ratio is printed"
    return ""


def disagreement(scores: dict[str, Tensor], reference: str = OURS) -> str:
    """The first implementation with another verdict on a last iterate than `reference`, except near ties; "" for none.

    scores: margins [n] by name.
    """
    for name, found in scores.items():
        differs = (found > 0) != (scores[reference] > 0)
        tie = (found.abs() < NEAR_TIE) & (scores[reference].abs() < NEAR_TIE)
        if wrong := (differs & ~tie).nonzero().flatten().tolist():
            verdicts = f"{count_noun(len(wrong), 'verdict')} ({_some(wrong)})"
            return f"{name} and {reference} differ on {verdicts}: no ratio is printed"
    return ""


def _weaker(judged: dict[str, Tensor], scores: dict[str, Tensor]) -> str:
    """The first implementation that breaks an image which robbench, with early stopping, finds robust; "" for none."""
    for name, robust in judged.items():
        if wrong := (judged[OURS] & ~robust & (scores[name].abs() >= NEAR_TIE)).nonzero().flatten().tolist():
            images = count_noun(len(wrong), "image")
            return f"{name} breaks {images} that robbench does not ({_some(wrong)}): no ratio is printed"
    return ""


def _some(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:5]))
    return f"image {shown}" if len(numbers) <= 5 else f"images {shown}, ..."


def report(found: Sequence[Result], contest: Contest, command: str) -> dict[str, Any]:
    """Everything as plain values, for JSON."""
    return plain(command, contest, DISTRIBUTIONS, "models", found)


def markdown(found: Sequence[Result], contest: Contest, command: str) -> str:
    """One section per model, one table per comparison."""
    lines = head(f"PGD-{contest.steps} in Linf against other libraries", command)
    lines += [
        f"Batch {contest.batch_size}, steps of epsilon/4 from the clean image, {contest.rounds} interleaved rounds in",
        "one process; median [quartiles]. Seconds (of one CPU thread: spent computing). Ratio: to robbench's time of",
        "the same round; above 1 is slower than robbench. `robbench/benchmarks/pgd.py` says what is compared and "
        "checked.",
    ]
    for one in found:
        lines += ["", f"## {one.model}: {one.n} images, epsilon {one.epsilon:g}", ""]
        lines += [f"{one.device}, {one.threads} thread(s)."]
        lines += ["", "Equal work: the attack alone, all steps for every image.", "", *one.work.table(3)]
        lines += ["", "Equal verdict: from images to who is robust.", "", *one.verdict.table(3)]
        lines += ["", *missing(one.absent)]
    return page(lines)
