"""Minimal-norm attacks against foolbox, torchattacks and ART, at the same number of iterations, in one process.

Compared is the search alone, all iterations, on the images that the model classifies correctly: its time, and the
median distance of its images, infinite for those that a clean forward classifies correctly and for black images, which
foolbox's C&W returns for a failure. robbench is to be no slower than the fastest, and no further away than the nearest.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from robbench.attacks import Attack, Victim, build_attack
from robbench.attacks.search.geometry import norm_of
from robbench.attacks.search.inner import attack_mode
from robbench.attacks.search.task import Task
from robbench.attacks.trust.context import full_precision
from robbench.benchmarks.pages import head, missing, page, plain, spread, table
from robbench.benchmarks.peers import available
from robbench.benchmarks.pgd import OURS, Subject
from robbench.benchmarks.pgd_peers import DISTRIBUTIONS, INSTALL
from robbench.benchmarks.timing import Quartiles, Tell, ignore, interleave, processor, quartiles, quotient
from robbench.core.errors import UserError
from robbench.specs import resolve_attack, threat_models

Search = Callable[[Tensor, Tensor], Tensor]  # images [n,C,H,W] in [0,1], labels [n] -> images
SEARCHES = 5  # values of c that C&W tries
# Early ends follow other rules in every library: all steps are taken.
CW: dict[str, Any] = {"binary_search_steps": SEARCHES, "abort_early": False}
FOOLBOX = {
    "cw-l2": "L2CarliniWagnerAttack",
    "deepfool-l2": "L2DeepFoolAttack",
    "deepfool-linf": "LinfDeepFoolAttack",
    "fmn-l2": "L2FMNAttack",
    "fmn-linf": "LInfFMNAttack",
    "fmn-l1": "L1FMNAttack",
    "fmn-l0": "L0FMNAttack",
    "ddn-l2": "DDNAttack",
}


@dataclass(frozen=True)
class Contest:
    """attacks: names of ours. steps: iterations of each, of C&W for each of `SEARCHES` values of c. rounds: measured
    runs of every implementation, after an unmeasured one."""

    attacks: tuple[str, ...] = tuple(FOOLBOX)
    steps: int = 100
    rounds: int = 5

    def attack(self, name: str) -> Attack:
        """robbench's attack; `UserError` for one that is not compared here."""
        if name not in FOOLBOX:
            raise UserError(f"--attack {name!r} has no counterpart here; give some of {', '.join(FOOLBOX)}")
        spec = resolve_attack(name, "", threat_models(), steps=self.steps)
        searches = CW if name == "cw-l2" else {}
        return build_attack(spec.model_copy(update={"parameters": {**spec.parameters, **searches}}))


@dataclass
class Line:
    """One implementation: median distance, samples without an adversarial image, quartiles of seconds and of the ratio
    to robbench's time in the same round."""

    distance: float
    failed: int
    seconds: Quartiles = field(default_factory=list)
    ratio: Quartiles = field(default_factory=list)


@dataclass
class Result:
    """One attack on one model. lines: by implementation; n: attacked images; absent: peers that are not installed, and
    how to get them."""

    model: str
    attack: str
    n: int
    device: str
    lines: dict[str, Line]
    absent: dict[str, str]


def foolbox(module: nn.Module, name: str, steps: int, device: torch.device) -> Search:
    """foolbox's attack of the same name."""
    from foolbox import attacks
    from foolbox.criteria import Misclassification
    from foolbox.models.pytorch import PyTorchModel

    searches = CW if name == "cw-l2" else {}
    attack = getattr(attacks, FOOLBOX[name])(steps=steps, **searches)
    model = PyTorchModel(module, bounds=(0, 1), device=device)
    return lambda x, y: cast(Tensor, attack.run(model, x, Misclassification(y)))


def torchattacks(module: nn.Module, name: str, steps: int, device: torch.device) -> Search:
    """torchattacks' DeepFool; its C&W has one fixed c."""
    import torchattacks

    return cast(Search, torchattacks.DeepFool(module, steps=steps))


def art(module: nn.Module, name: str, steps: int, device: torch.device) -> Search:
    """ART's C&W and DeepFool; in batches of all images."""
    from art.attacks.evasion import CarliniL2Method, DeepFool
    from art.estimators.classification import PyTorchClassifier

    def search(x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            classes = module(x[:1]).shape[1]
        classifier: Any = PyTorchClassifier(
            module, loss=nn.CrossEntropyLoss(), input_shape=tuple(x.shape[1:]), nb_classes=classes,
            clip_values=(0.0, 1.0), device_type="gpu" if device.type == "cuda" else "cpu",
        )  # fmt: skip
        common = {"max_iter": steps, "batch_size": len(x), "verbose": False}
        attack: Any = (
            CarliniL2Method(classifier, binary_search_steps=SEARCHES, **common)
            if name == "cw-l2"
            else DeepFool(classifier, epsilon=0.02, nb_grads=10, **common)
        )
        return torch.from_numpy(attack.generate(x.cpu().numpy(), y.cpu().numpy())).to(device)

    return search


Build = Callable[[nn.Module, str, int, torch.device], Search]
PEERS: dict[str, tuple[Build, tuple[str, ...]]] = {
    "foolbox": (foolbox, tuple(FOOLBOX)),
    "torchattacks": (torchattacks, ("deepfool-l2",)),
    "ART": (art, ("cw-l2", "deepfool-l2")),
}


def compare(subject: Subject, name: str, contest: Contest, tell: Tell = ignore) -> Result:
    """One attack on one model by every implementation that has it."""
    with attack_mode(subject.module), full_precision():
        device, attack = subject.device, contest.attack(name)
        x, y = subject.x.to(device), subject.y.to(device)
        victim = Victim(subject.module, device, len(x))
        right = victim.margins(x, y) > 0
        x, y = x[right], y[right]
        builds = {
            peer: partial(build, subject.module, name, contest.steps, device)
            for peer, (build, known) in PEERS.items()
            if name in known
        }
        peers, absent = available(builds, INSTALL)
        runs = {OURS: partial(_ours, attack, victim, x, y), **{k: partial(v, x, y) for k, v in peers.items()}}
        lines = {who: _line(victim, attack, x, y, run()) for who, run in runs.items()}
        times = interleave(runs, contest.rounds, device, tell)
    for who, line in lines.items():
        line.seconds, line.ratio = quartiles(times[who]), quotient(times[who], times[OURS])
    return Result(subject.name, name, len(x), processor(device), lines, absent)


def _ours(attack: Attack, victim: Victim, x: Tensor, y: Tensor) -> Tensor:
    with victim.lean_search(x):
        return attack.search(victim, Task(torch.arange(len(x)), x, y, y, 0, len(x))).adversarial


def _line(victim: Victim, attack: Attack, x: Tensor, y: Tensor, found: Tensor) -> Line:
    found = found.detach().to(x)
    size = norm_of(found.double() - x.double(), attack.spec.norm)
    failed = (victim.margins(found, y) > 0) | (found == 0).flatten(1).all(1)
    return Line(float(size.masked_fill(failed, float("inf")).median()), int(failed.sum()))


def report(found: Sequence[Result], contest: Contest, command: str) -> dict[str, Any]:
    """Everything as plain values, for JSON."""
    return plain(command, contest, DISTRIBUTIONS, "comparisons", found)


def markdown(found: Sequence[Result], contest: Contest, command: str) -> str:
    """One table per model and attack."""
    lines = head("Minimal-norm attacks against other libraries", command)
    lines += [
        f"{contest.steps} iterations, of C&W for each of {SEARCHES} values of c; {contest.rounds} interleaved rounds",
        "in one process; median [quartiles]. Ratio: to robbench's time of the same round; above 1 is slower than it.",
    ]
    for one in found:
        rows = [
            [who, f"{line.distance:.4f}", str(line.failed), spread(line.seconds, 3), spread(line.ratio, 2)]
            for who, line in one.lines.items()
        ]
        lines += ["", f"## {one.model}, {one.attack}: {one.n} images", "", f"{one.device}.", ""]
        lines += table(("", "median distance", "failed", "seconds", "ratio"), rows)
        lines += missing(one.absent)
    return page(lines)
