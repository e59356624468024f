"""What robbench's attacks reach on one GPU: images a second, share of the model's own peak, ratios to other libraries.

    python benchmarks/gpu.py --out reports/benchmarks            # writes gpu.json and gpu.md

Random weights and random 3x32x32 images, labels are the network's own predictions; three attacks:
  pgd20   Linf, all steps for every image; against foolbox, torchattacks and ART (robbench/benchmarks/pgd.py)
  aa      AutoAttack with the short budgets that the table states; against pyautoattack with the same
  jsa50   through a Glow with random weights, all steps; against a plain loop over FrEIA, normflows and nflows
Peak: the attack's own forwards and backwards (jsa50: of decoder and classifier together), each at the cost it has alone
at the best of several batch sizes and memory formats, fp32 without TF32. A share of 1 would be an attack for free.
No ratio where the verdicts differ, see the modules; for aa, where robbench's robust images outnumber the reference's
by more than a hundredth of all. Peers that are not installed are named. Without CUDA: one line and exit code 2.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robbench.attacks import Outcome, Victim, build_attack
from robbench.attacks.codec import FlowCodec
from robbench.attacks.search.inner import attack_mode
from robbench.attacks.trust.context import full_precision
from robbench.benchmarks import latent, pgd
from robbench.benchmarks.autoattack import floor
from robbench.benchmarks.flow_report import REFERENCE
from robbench.benchmarks.flows import CASES, Case, prepare
from robbench.benchmarks.models import random_classifier
from robbench.benchmarks.pages import spread
from robbench.benchmarks.timing import interleave, processor, quartiles, quotient
from robbench.core.device import versions
from robbench.core.resources import write_text_atomically
from robbench.specs import ResolvedAttack, resolve_attack, threat_models

NOT_RUN = 2


@dataclass(frozen=True)
class Plan:
    """Sizes. n, batch_size: images of pgd20 and aa, and how many at once. jsa_batch: images of jsa50. batches: where
    the peak is looked for. iterations, targets, queries: aa's budgets. epsilon: of pgd20 and aa, in pixels."""

    architecture: str = "resnet18"
    n: int = 2048
    batch_size: int = 1024
    jsa_batch: int = 256
    pgd_steps: int = 20
    jsa_steps: int = 50
    iterations: int = 10
    targets: int = 3
    queries: int = 200
    epsilon: float = 0.5 / 255
    rounds: int = 5
    batches: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048, 4096)


@dataclass
class Row:
    """One attack. seconds: quartiles of robbench's time for `images` images. peak_share: see the head of the file."""

    attack: str
    images: int
    robust: dict[str, int]
    seconds: list[float]
    peak_seconds: float
    ratio: dict[str, list[float]] = field(default_factory=dict)
    refused: str = ""
    absent: dict[str, str] = field(default_factory=dict)

    @property
    def images_a_second(self) -> float:
        return self.images / self.seconds[1]

    @property
    def peak_share(self) -> float:
        return self.peak_seconds / self.seconds[1]


def peak_seconds(
    module: nn.Module, x: Tensor, forwards: int, backwards: int, device: torch.device, plan: Plan
) -> float:
    """Seconds of so many model calls at the best batch size that fits into memory; see the head of the file."""
    found: list[float] = []
    for batch in plan.batches:
        try:
            found.append(floor(module, x, forwards, backwards, device, (batch,)))
        except torch.cuda.OutOfMemoryError:
            tell(f"a batch of {batch} does not fit into memory; the peak is that of smaller ones")
            break
    return min(found)


def pgd_row(plan: Plan, device: torch.device) -> Row:
    module, x, y = random_classifier(plan.architecture, plan.n)
    subject = pgd.Subject(plan.architecture, module, x, y, plan.epsilon, device)
    contest = pgd.Contest(plan.pgd_steps, plan.batch_size, plan.rounds)
    result = pgd.compare(subject, contest, tell)
    work = result.work
    with attack_mode(module), full_precision():
        run = pgd.Arena(subject, contest, {}).searches()[pgd.OURS]
        alone = interleave({pgd.OURS: run}, plan.rounds, device, tell)[pgd.OURS]
        calls = plan.n * plan.pgd_steps
        peak = peak_seconds(module, x, calls, calls, device, plan)
    seconds = work.seconds.get(pgd.OURS) or quartiles(alone)
    name = f"pgd{plan.pgd_steps}"
    return Row(name, plan.n, work.robust, seconds, peak, work.ratio, work.refused, result.absent)


def aa_spec(name: str, plan: Plan) -> ResolvedAttack:
    """aa or aa-reference with the plan's budgets."""
    spec = resolve_attack(name, "", threat_models(), epsilon=plan.epsilon)
    short = {"iterations": plan.iterations, "square_queries": plan.queries}
    targets = {"target_classes": plan.targets, "fab_target_classes": plan.targets}
    return spec.model_copy(update={"parameters": {**spec.parameters, **short, **targets}})


def aa_row(plan: Plan, device: torch.device) -> Row:
    module, x, y = random_classifier(plan.architecture, plan.n)
    victim, ids = Victim(module, device, plan.batch_size), torch.arange(plan.n)
    attacks = {name: build_attack(aa_spec(name, plan)) for name in ("aa", "aa-reference")}

    def run(name: str) -> Outcome:
        return attacks[name].evaluate(victim, ids, x, y, seed=0, batch_size=plan.batch_size)

    outcomes = {name: run(name) for name in attacks}
    robust = {name: int(outcome.robust.sum()) for name, outcome in outcomes.items()}
    times = interleave({name: partial(run, name) for name in attacks}, plan.rounds, device, tell)
    forwards, backwards = (int(getattr(outcomes["aa"], of).sum()) for of in ("forwards", "backwards"))
    with full_precision():
        peak = peak_seconds(module, x, forwards, backwards, device, plan)
    name = f"aa ({plan.iterations} iterations, {plan.targets} targets, {plan.queries} queries)"
    row = Row(name, plan.n, robust, quartiles(times["aa"]), peak)
    if robust["aa"] - robust["aa-reference"] > plan.n // 100:
        row.refused = f"aa leaves {robust['aa']} images robust, the reference {robust['aa-reference']}"
    else:
        row.ratio = {other: quotient(values, times["aa"]) for other, values in times.items()}
    return row


class Decoded(nn.Module):
    """Latents in the images' shape -> logits of the decoded image: what one step of a latent attack differentiates."""

    def __init__(self, codec: FlowCodec, module: nn.Module) -> None:
        super().__init__()
        self.codec, self.module = codec, module

    def forward(self, z: Tensor) -> Tensor:
        logits: Tensor = self.module(self.codec.decode_flat(z.flatten(1)))
        return logits


def jsa_row(plan: Plan, device: torch.device, case: Case) -> Row:
    case = replace(case, batch=plan.jsa_batch)
    contest = latent.Contest(("jsa50",), plan.jsa_steps, plan.rounds, classifier=plan.architecture)
    result = latent.compare(case, contest, tell, device)
    found = result.attacks[0]
    arena = latent.Arena(case, contest, prepare(replace(case, peers={})).to(device), device)
    with attack_mode(arena.module), full_precision():
        run = arena.runs(contest.spec("jsa50"))[REFERENCE]
        alone = interleave({REFERENCE: run}, plan.rounds, device, tell)[REFERENCE]
        codec = arena.codecs["none"]
        z = codec.encode_flat(arena.x).reshape(arena.x.shape)
        calls = plan.jsa_batch * plan.jsa_steps
        peak = peak_seconds(Decoded(codec, arena.module), z, calls, calls, device, plan)
    seconds = found.seconds.get(REFERENCE) or quartiles(alone)
    name = f"jsa{plan.jsa_steps}"
    return Row(name, plan.jsa_batch, found.robust, seconds, peak, found.ratio, found.refused, result.absent)


def measure(plan: Plan, device: torch.device, case: Case) -> list[Row]:
    """Every attack, on any device; the numbers mean something on a GPU."""
    return [pgd_row(plan, device), aa_row(plan, device), jsa_row(plan, device, case)]


def tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def report(rows: Sequence[Row], plan: Plan, device: torch.device, command: str) -> dict[str, Any]:
    """Everything as plain values, for JSON."""
    attacks = [
        asdict(row) | {"images_a_second": row.images_a_second, "peak_share": row.peak_share} for row in rows
    ]
    return {
        "command": command,
        "device": processor(device),
        "cuda": torch.version.cuda,
        "versions": versions(),
        "plan": asdict(plan),
        "attacks": attacks,
    }


def markdown(rows: Sequence[Row], plan: Plan, device: torch.device, command: str) -> str:
    """The table for people."""
    lines = [f"# Attacks on {processor(device)}", "", f"    {command}", ""]
    lines += [
        f"{plan.architecture} with random weights, random 3x32x32 images; fp32 without TF32. Median [quartiles] of "
        f"{plan.rounds} interleaved rounds. Ratios: a peer's time over robbench's of the same round.",
        "`benchmarks/gpu.py` says what is compared and what the peak is.",
        "",
        "| attack | images | robust | images a second | share of the peak | ratios |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        ratios = "; ".join(f"{name} {spread(values, 2)}" for name, values in row.ratio.items())
        cells = [row.attack, str(row.images), "; ".join(f"{name} {n}" for name, n in row.robust.items())]
        cells += [f"{row.images_a_second:.1f}", f"{row.peak_share:.2f}", ratios or f"refused: {row.refused}"]
        lines.append(f"| {' | '.join(cells)} |")
    missing = {name: why for row in rows for name, why in row.absent.items()}
    lines += ["", *(f"* {name} is missing: {why}" for name, why in missing.items())]
    return "\n".join(lines).rstrip() + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--n", type=int, default=Plan.n, help="images of pgd20 and aa")
    parser.add_argument("--batch-size", type=int, default=Plan.batch_size)
    parser.add_argument("--jsa-batch", type=int, default=Plan.jsa_batch)
    parser.add_argument("--rounds", type=int, default=Plan.rounds)
    parser.add_argument("--out", type=Path, help="folder of gpu.json and gpu.md; printed only by default")
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(f"not run on a GPU: torch {torch.__version__} finds no CUDA device", file=sys.stderr)
        return NOT_RUN
    device = torch.device(given.device)
    plan = Plan(n=given.n, batch_size=given.batch_size, jsa_batch=given.jsa_batch, rounds=given.rounds)
    command = shlex.join(["python", "benchmarks/gpu.py", *(sys.argv[1:] if arguments is None else arguments)])
    rows = measure(plan, device, CASES["small"])
    text = markdown(rows, plan, device, command)
    print(text)
    if given.out:
        plain = report(rows, plan, device, command)
        write_text_atomically(given.out / "gpu.json", json.dumps(plain, indent=1) + "\n")
        write_text_atomically(given.out / "gpu.md", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
