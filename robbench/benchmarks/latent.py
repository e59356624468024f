"""JSA-50 and A-LA through robbench's frozen flow against a plain loop over other libraries' Glow at the same weights.

Before any timing, the libraries' flows must be the same function as robbench's (`flows.deviations`), and the attacks'
verdicts must agree: all start from the clean image, make all steps, and must find the same images robust after the last
one, except near ties (see `pgd`). The classifier has random weights; its own predictions are the labels. Encoding the
images, by robbench's flow, is part of all times.

Memory: measured peak of the bytes that PyTorch allocates in one gradient step, and the largest batch whose step stays
below the peak of memory "none" at the batch of the comparison.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn

from robbench.attacks import Attack, Victim, build_attack
from robbench.attacks.base import Task
from robbench.attacks.codec import FlowCodec
from robbench.attacks.pgd import GradientAttack
from robbench.attacks.search.decision import margins
from robbench.attacks.search.geometry import SampleNoise
from robbench.attacks.search.inner import attack_mode, gradients
from robbench.attacks.trust.context import full_precision
from robbench.benchmarks.flow_peers import GLOW, Decode
from robbench.benchmarks.flow_report import REFERENCE
from robbench.benchmarks.flows import CASES, Bench, Case, Disagreement, deviations, prepare
from robbench.benchmarks.models import random_classifier
from robbench.benchmarks.pages import Verdicts, head, missing, page, plain, spread, table
from robbench.benchmarks.pgd import disagreement
from robbench.benchmarks.timing import Tell, ignore, interleave, peak_bytes, processor
from robbench.core.errors import UserError, unknown_name
from robbench.models.flows.base import Flow, Latents, Memory
from robbench.specs import ResolvedAttack, attack_among, resolve_attack, threat_models

ATTACKS = ("jsa50", "a-la")
BUDGETS_OF = "cifar10"  # the random images have its shape
CPU = torch.device("cpu")
ETA = 0.02  # IJSAT's; the larger one of A-LA drives a Glow with random weights far out of the box


@dataclass(frozen=True)
class Contest:
    """A comparison.

    Attributes:
        attacks: names under the joint or a latent threat model, with CIFAR-10's epsilon.
        steps: instead of the attacks' own.
        rounds: measured runs per implementation.
        eta: latent budget.
        classifier: a registered architecture.
    """

    attacks: tuple[str, ...] = ATTACKS
    steps: int | None = None
    rounds: int = 5
    eta: float = ETA
    classifier: str = "digits-cnn"

    def spec(self, name: str) -> ResolvedAttack:
        """The attack without random start and early stop; `UserError` unless it is a gradient search in latents."""
        known = threat_models()
        possible = [
            attack
            for model in known.values()
            for attack, found in model.attacks.items()
            if model.space != "image" and found.algorithm in ("jsa", "latent-pgd")
        ]
        found = attack_among(name, possible, "attack through a flow")
        spec = resolve_attack(found, BUDGETS_OF, known, eta=self.eta, steps=self.steps)
        return spec.model_copy(
            update={"parameters": {**spec.parameters, "start": "zero", "early_stop": False}}
        )


@dataclass(kw_only=True)
class AttackTimes(Verdicts):
    """Verdicts and times of one attack; ratios are those to "robbench none". steps: of the attack."""

    attack: str
    steps: int


@dataclass(frozen=True)
class MemoryUse:
    """One memory mode: peak bytes of a gradient step at the comparison's batch, and the largest batch that stays within
    the peak of mode "none"."""

    peak: int
    largest_batch: int


@dataclass
class Result:
    """Everything about one flow.

    Attributes:
        flow: its description.
        batch: images per batch.
        device: name of the processor.
        threads: CPU threads.
        attacks: verdicts and times, one per attack.
        memory: peak and largest batch by memory mode.
        absent: libraries that are not installed, and how to get them.
    """

    flow: str
    batch: int
    device: str
    threads: int
    attacks: list[AttackTimes]
    memory: dict[str, MemoryUse]
    absent: dict[str, str]


def glow_case(name: str) -> Case:
    """A case of `flows.CASES` with a Glow; `UserError` for another."""
    glows = {name: case for name, case in CASES.items() if case.peers is GLOW}
    if name not in glows:
        raise unknown_name("case", name, glows)
    return glows[name]


def compare(
    case: Case,
    contest: Contest,
    tell: Tell = ignore,
    device: torch.device = CPU,
) -> Result:
    """Parity and times of every attack, and memory of every mode; `UserError` when a library's flow differs from
    robbench's, or an attack makes no gradient steps through a flow."""
    specs = [contest.spec(name) for name in contest.attacks]
    try:
        deviations(prepare(case, torch.float64).to(device))
        bench = prepare(case).to(device)
        with full_precision():
            deviations(bench)
    except Disagreement as error:
        raise UserError(f"refused: {error}") from None
    arena = Arena(case, contest, bench, device)
    with attack_mode(arena.module), full_precision():
        times = [arena.time_attack(spec, contest.rounds, tell) for spec in specs]
        memory = arena.memory(specs[0])
    name = processor(device)
    return Result(case.what, case.batch, name, torch.get_num_threads(), times, memory, bench.absent)


class Arena:
    """One flow, one classifier, one batch of images. Use inside `attack_mode(module)`."""

    def __init__(self, case: Case, contest: Contest, bench: Bench, device: torch.device = CPU) -> None:
        self.device = device
        self.flow: Flow = case.build().eval()
        self.module, x, y = random_classifier(contest.classifier, case.batch, self.flow.input_shape)
        self.x, self.y = x.to(device), y.to(device)
        self.victim = Victim(self.module, device, case.batch)
        self.codecs = {
            memory: FlowCodec(self.flow.freeze(memory=memory).to(device)) for memory in get_args(Memory)
        }
        self.decoders = {
            name: decode
            for name, decode in bench.decoders.items()
            if not name.startswith("robbench") and not name.endswith("channels_last")
        }

    def runs(self, spec: ResolvedAttack) -> dict[str, Callable[[], Tensor]]:
        """Functions that return adversarial images, by name."""
        ours = {
            f"robbench {memory}": self._ours(build_on(spec, codec)) for memory, codec in self.codecs.items()
        }
        return {**ours, **{name: self._plain(decode, spec) for name, decode in self.decoders.items()}}

    def time_attack(self, spec: ResolvedAttack, rounds: int, tell: Tell) -> AttackTimes:
        """Verdicts of all implementations, and interleaved times where they agree."""
        runs = self.runs(spec)
        scores = {name: margins(self.victim.logits(run()), self.y) for name, run in runs.items()}
        found = AttackTimes(
            attack=spec.name,
            steps=spec.parameters["steps"],
            robust={name: int((m > 0).sum()) for name, m in scores.items()},
            refused=disagreement(scores, REFERENCE),
        )
        if not found.refused:
            times = interleave(runs, rounds, self.device, lambda line: tell(f"{spec.name}: {line}"))
            found.add_times(times, REFERENCE)
        return found

    def memory(self, spec: ResolvedAttack) -> dict[str, MemoryUse]:
        """Peak and largest batch of every memory mode."""
        batch = len(self.x)
        limit = self._peak(spec, "none", batch)
        return {
            mode: MemoryUse(self._peak(spec, mode, batch), self._largest(spec, mode, limit))
            for mode in get_args(Memory)
        }

    def _largest(self, spec: ResolvedAttack, mode: Memory, limit: int) -> int:
        """The largest batch whose measured peak is at most `limit`: predicted from two batches, then measured."""
        small, large = len(self.x), 2 * len(self.x)
        low, high = self._peak(spec, mode, small), self._peak(spec, mode, large)
        guess = small + int((limit - low) * (large - small) / (high - low))
        while guess > small and self._peak(spec, mode, guess) > limit:
            guess -= max(1, guess // 50)
        return guess

    def _peak(self, spec: ResolvedAttack, mode: Memory, batch: int) -> int:
        attack = build_on(spec, self.codecs[mode])
        space = attack.space()
        rows = torch.arange(batch) % len(self.x)
        x, y = self.x[rows], self.y[rows]
        state = space.start(x, y, SampleNoise(0, spec.name, rows, 0, x.device))

        def loss(image: Tensor) -> Tensor:
            return nn.functional.cross_entropy(self.module(image), y, reduction="none")

        return peak_bytes(lambda: gradients(space, dict(state), loss), x.device)

    def _ours(self, attack: Attack) -> Callable[[], Tensor]:
        ids = torch.arange(len(self.x))
        task = Task(ids, self.x, self.y, self.y, 0, len(self.x))
        return lambda: attack.search(self.victim, task).adversarial

    def _plain(self, decode: Decode, spec: ResolvedAttack) -> Callable[[], Tensor]:
        levels, flow, y = self.flow.level_shapes, self.flow, self.y

        def image(z: Tensor) -> Tensor:
            v = decode(Latents.unflat(z, levels).levels, y)
            return (flow.preprocessing.inverse(v) * flow.grey_levels - 0.5) / (flow.grey_levels - 1)

        loop = plain_joint if spec.space == "joint" else plain_latent
        return lambda: loop(image, self.module, self.codecs["none"].encode_flat(self.x, y), y, spec)


def build_on(spec: ResolvedAttack, codec: FlowCodec) -> GradientAttack:
    """robbench's attack through a frozen flow with a given memory mode."""
    attack = build_attack(spec, codec.flow)
    assert isinstance(attack, GradientAttack)
    return attack


def plain_joint(
    decode: Callable[[Tensor], Tensor], module: nn.Module, z: Tensor, y: Tensor, spec: ResolvedAttack
) -> Tensor:
    """JSA as a plain loop: decode, add delta, classify, one gradient for both, sign steps."""
    epsilon, eta = float(spec.epsilon or 0.0), float(spec.eta or 0.0)
    share, shift = spec.parameters.get("relative_step_size", 0.25), torch.zeros_like(z)
    with torch.no_grad():
        delta = torch.zeros_like(decode(z[:1])).repeat(len(z), 1, 1, 1)
    for _ in range(spec.parameters["steps"]):
        shift.requires_grad_(True)
        decoded = decode(z + shift)
        delta = _in_box(decoded, delta).requires_grad_(True)
        loss = nn.functional.cross_entropy(module(decoded + delta), y, reduction="sum")
        to_shift, to_delta = torch.autograd.grad(loss, (shift, delta))
        shift = (shift.detach() + share * eta * to_shift.sign()).clamp(-eta, eta)
        delta = (delta.detach() + share * epsilon * to_delta.sign()).clamp(-epsilon, epsilon)
    with torch.no_grad():
        decoded = decode(z + shift)
        return (decoded + _in_box(decoded, delta)).clamp(0.0, 1.0)


def _in_box(decoded: Tensor, delta: Tensor) -> Tensor:
    centre = decoded.detach().clamp(0.0, 1.0)
    return (centre + delta.detach()).clamp(0.0, 1.0) - centre


def plain_latent(
    decode: Callable[[Tensor], Tensor], module: nn.Module, z: Tensor, y: Tensor, spec: ResolvedAttack
) -> Tensor:
    """A-LA as a plain loop."""
    eta, shift = float(spec.eta or 0.0), torch.zeros_like(z)
    step = spec.parameters.get("relative_step_size", 0.25) * eta
    for _ in range(spec.parameters["steps"]):
        shift.requires_grad_(True)
        loss = nn.functional.cross_entropy(module(decode(z + shift)), y, reduction="sum")
        (slope,) = torch.autograd.grad(loss, shift)
        shift = (shift.detach() + step * slope.sign()).clamp(-eta, eta)
    with torch.no_grad():
        return decode(z + shift).clamp(0.0, 1.0)


def report(found: Sequence[Result], contest: Contest, command: str) -> dict[str, Any]:
    """Everything as plain values, for JSON."""
    return plain(command, contest, {name: name for name in GLOW}, "flows", found)


def markdown(found: Sequence[Result], contest: Contest, command: str) -> str:
    """One section per flow, one table per attack, one of memory."""
    lines = head("Attacks through a flow against a plain loop over other libraries", command)
    lines += [
        f"The same weights, images, start and steps; {contest.rounds} interleaved rounds in one process; median",
        f"[quartiles]. Budgets of CIFAR-10 (epsilon 8/255), eta {contest.eta:g}.",
        "Seconds (of one CPU thread: spent computing). Ratio: to `robbench none` of the same round; above 1 is slower.",
        "frozen: no parameter gradients, the library's cache where it has one; naive: as constructed. none, mask,",
        "invert: robbench's memory modes. `robbench/benchmarks/latent.py` says what is compared and checked.",
    ]
    for one in found:
        lines += ["", f"## {one.flow}, batch {one.batch}", "", f"{one.device}, {one.threads} thread(s)."]
        for times in one.attacks:
            lines += ["", f"### {times.attack}, {times.steps} steps", "", *times.table(2)]
        lines += ["", "### Memory of a gradient step", "", *_memory_table(one)]
        lines += ["", *missing(one.absent)]
    return page(lines)


def _memory_table(one: Result) -> list[str]:
    """Peaks, largest batches, and times of the memory modes."""
    costs = [times for times in one.attacks if times.ratio]
    header = ["memory", "peak, MB", "largest batch within the peak of `none`", "batch grows by"]
    rows = [
        [mode, f"{use.peak / 1e6:.1f}", str(use.largest_batch), f"{use.largest_batch / one.batch:.1f}"]
        + [spread(times.ratio[f"robbench {mode}"], 2) for times in costs]
        for mode, use in one.memory.items()
    ]
    return table([*header, *(f"time, {times.attack}" for times in costs)], rows)
