"""One search loop for all iterative attacks: an active set that is refilled as samples finish.

A sample leaves as soon as a clean forward of its admissible image is misclassified (early stop), a robust sample gets
its full number of steps, and the places of those that left are filled with waiting samples, so that the device sees
full batches. Noise is keyed by sample id; nothing here depends on the order or the batch size beyond rounding.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robbench.attacks.base import Candidates, Task
from robbench.attacks.geometry import TINY, SampleNoise, norm_of, per_sample
from robbench.attacks.inner import gradients
from robbench.attacks.spaces import SearchSpace, State
from robbench.attacks.victim import Victim, chunks, margins


@dataclass(frozen=True)
class SearchPlan:
    """steps: gradient steps a restart. restarts: random starts tried until one succeeds. momentum: decay of the
    accumulated L1-normalised gradient (Dong et al. 2018), None for none. early_stop: see the module."""

    space: SearchSpace
    steps: int
    restarts: int = 1
    momentum: float | None = None
    early_stop: bool = True
    label_source: str = "true"


class ActiveSet:
    """Runs one restart of a plan over the given rows of a task and writes into `found`."""

    def __init__(
        self, victim: Victim, plan: SearchPlan, task: Task, found: Candidates, restart: int, stream: str
    ):
        self.victim, self.plan, self.task, self.found = victim, plan, task, found
        self.restart, self.stream = restart, stream

    def run(self, rows: Tensor) -> None:
        """rows: positions in the task, [m], on the CPU."""
        waiting = list(chunks(rows, self.task.batch_size))
        state, places, steps = self._begin(waiting.pop(0))
        while len(places):
            state, places, steps = self._step(state, places, steps)
            missing = self.task.batch_size - len(places)
            if waiting and missing:
                state, places, steps = self._refill(waiting, missing, state, places, steps)

    def _begin(self, rows: Tensor) -> tuple[State, Tensor, Tensor]:
        x, y = self.task.x[rows], self.task.y[rows]
        ids = self.task.ids[rows]
        noise = SampleNoise(self.task.seed, self.stream, ids, self.restart, self.victim.device)
        state = self.plan.space.start(x, y, noise)
        source = self.task.clean_predictions[rows] if self.plan.label_source == "predicted" else y
        state = {**state, "target": source}
        if self.plan.momentum is not None:
            state |= {
                f"momentum/{name}": torch.zeros_like(state[name]) for name in self.plan.space.perturbations
            }
        return state, rows, torch.zeros(len(rows), dtype=torch.int64)

    def _refill(
        self, waiting: list[Tensor], missing: int, state: State, places: Tensor, steps: Tensor
    ) -> tuple[State, Tensor, Tensor]:
        rows = waiting.pop(0)
        if len(rows) > missing:
            waiting.insert(0, rows[missing:])
            rows = rows[:missing]
        fresh, new_places, new_steps = self._begin(rows)
        merged = {name: torch.cat([state[name], fresh[name]]) for name in fresh} if len(places) else fresh
        return merged, torch.cat([places, new_places]), torch.cat([steps, new_steps])

    def _step(self, state: State, places: Tensor, steps: Tensor) -> tuple[State, Tensor, Tensor]:
        """One gradient step for everybody; broken and finished samples are recorded and leave."""
        logits: list[Tensor] = []

        def loss(image: Tensor) -> Tensor:
            out = self.victim.differentiable(image)
            logits.append(out.detach())
            return nn.functional.cross_entropy(out, state["target"], reduction="none")

        slopes, state = gradients(self.plan.space, state, loss)
        self.found.forwards[places] += 1
        self.found.backwards[places] += 1
        leaving = torch.zeros(len(places), dtype=torch.bool)
        if self.plan.early_stop:
            leaving = self._record_broken(state, places, steps, logits[0])
        state = self.plan.space.advance(*self._with_momentum(state, slopes))
        steps = steps + 1
        ended = (steps >= self.plan.steps) & ~leaving
        if bool(ended.any()):
            self._record(state, places, ended)
        keep = ~(leaving | ended)
        if bool(keep.all()):
            return state, places, steps
        chosen = keep.to(self.victim.device)
        return {name: value[chosen] for name, value in state.items()}, places[keep], steps[keep]

    def _record_broken(self, state: State, places: Tensor, steps: Tensor, logits: Tensor) -> Tensor:
        """Which samples a clean forward of the admissible image finds misclassified; they are written down."""
        suspects = (margins(logits, state["y"]) <= 0).cpu()
        if not bool(suspects.any()):
            return suspects
        chosen = suspects.to(self.victim.device)
        part = {name: value[chosen] for name, value in state.items()}
        image = self.plan.space.finish(part)
        self.found.forwards[places[suspects]] += 1
        broken = (margins(self.victim.logits(image), part["y"]) <= 0).cpu()
        confirmed = suspects.clone()
        confirmed[suspects] = broken
        self._write(part, image, places[suspects], broken)
        self.found.step[places[confirmed]] = steps[confirmed]
        return confirmed

    def _record(self, state: State, places: Tensor, chosen: Tensor) -> None:
        """Last iterates; whether they are broken is the base class's to say, the step is the last one."""
        where = chosen.to(self.victim.device)
        part = {name: value[where] for name, value in state.items()}
        rows = places[chosen]
        self._write(part, self.plan.space.finish(part), rows, torch.ones(len(rows), dtype=torch.bool))
        self.found.step[rows] = self.plan.steps

    def _write(self, part: State, image: Tensor, rows: Tensor, chosen: Tensor) -> None:
        where = chosen.to(image.device)
        self.found.adversarial[rows[chosen]] = image[where]
        for name in self.found.witness:
            self.found.witness[name][rows[chosen]] = part[name][where]

    def _with_momentum(self, state: State, slopes: State) -> tuple[State, State]:
        if self.plan.momentum is None:
            return state, slopes
        moved: State = {}
        for name, slope in slopes.items():
            size = per_sample(norm_of(slope, "l1").clamp(min=TINY), slope)
            moved[name] = self.plan.momentum * state[f"momentum/{name}"] + slope / size
        return {**state, **{f"momentum/{name}": value for name, value in moved.items()}}, moved


def search(
    victim: Victim, plan: SearchPlan, task: Task, name: str, witnesses: tuple[str, ...] = ()
) -> Candidates:
    """Run every restart of `plan`; later restarts only see samples no earlier one broke.

    The noise stream is (seed, algorithm name, restart, sample id). Returned tensors are on the victim's device.
    """
    n = len(task.x)
    zeros = torch.zeros(n, dtype=torch.int64)
    found = Candidates(task.x.clone(), zeros - 1, zeros.clone(), zeros.clone(), [name] * n)
    rows = torch.arange(n)
    for restart in range(plan.restarts):
        if not len(rows):
            break
        if restart == 0:
            found.witness = _empty_witness(plan, task, witnesses)
        ActiveSet(victim, plan, task, found, restart, name).run(rows)
        if restart + 1 < plan.restarts:
            rows = still_robust(victim, task, found, rows)
    return found


def _empty_witness(plan: SearchPlan, task: Task, witnesses: tuple[str, ...]) -> dict[str, Tensor]:
    noise = SampleNoise(task.seed, "shape", task.ids[:1], 0, task.x.device)
    sample = plan.space.start(task.x[:1], task.y[:1], noise)
    return {
        name: torch.zeros((len(task.x), *sample[name].shape[1:]), device=task.x.device) for name in witnesses
    }


def still_robust(victim: Victim, task: Task, found: Candidates, rows: Tensor) -> Tensor:
    """The rows whose current example a clean forward classifies correctly (counted)."""
    kept = []
    for part in chunks(rows, task.batch_size):
        right = margins(victim.logits(found.adversarial[part]), task.y[part]) > 0
        found.forwards[part] += 1
        kept.append(part[right.cpu()])
    return torch.cat(kept)
