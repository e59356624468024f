"""Gradient ascent in a search space, as a search of the active set: what PGD, MIM, latent and joint attacks run.

They climb the cross-entropy, or descend that of a target class. What is differentiated is `error_log_odds` of the
tempered logits (`temper_logits`): it has the same ascent directions, does not saturate, and does not depend on the
scale of very large or small logits.

With early stopping a sample leaves at its first misclassified iterate; a robust sample gets all its steps. Noise is
keyed by sample id.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from robbench.attacks.search.active import Search, fresh_state, note, run_search, still_robust
from robbench.attacks.search.decision import margins
from robbench.attacks.search.geometry import SampleNoise, normalise, per_sample, put, stands_still
from robbench.attacks.search.goals import goal_margins
from robbench.attacks.search.inner import error_log_odds, gradients, temper_logits
from robbench.attacks.search.spaces import SearchSpace, State
from robbench.attacks.search.task import Candidates, Task
from robbench.attacks.victim import Victim


@dataclass(frozen=True)
class SearchPlan:
    """Settings of a gradient search.

    Attributes:
        space: where the perturbation is searched.
        steps: gradient steps per restart.
        restarts: random starts, until one succeeds.
        momentum: decay of the accumulated L1-normalised gradient (Dong et al. 2018); None for none.
        early_stop: whether a sample leaves at its first misclassified iterate.
        label_source: "true", or "predicted": the loss uses the clean prediction.
    """

    space: SearchSpace
    steps: int
    restarts: int = 1
    momentum: float | None = None
    early_stop: bool = True
    label_source: str = "true"


class GradientSearch(Search):
    """One restart of a plan.

    In latent spaces an iterate may leave the box, and its logits are not those of the clipped image: the active set
    then confirms "broken" by a forward of the clipped image (`claims_only`).
    """

    def __init__(self, plan: SearchPlan, name: str, restart: int, witnesses: tuple[str, ...]) -> None:
        self.plan, self.space, self.name, self.restart = plan, plan.space, name, restart
        self.iterations, self.witnesses = plan.steps, witnesses
        self.claims_only = not plan.space.admissible

    def begin(self, victim: Victim, task: Task) -> State:
        noise = SampleNoise(task.seed, self.name, task.ids, self.restart, victim.device)
        state = self.space.start(task.x, task.y, noise)
        target = task.clean_predictions if self.plan.label_source == "predicted" else task.y
        state |= {"target": target, **fresh_state(task.x)}
        if task.targets is not None:
            state["aim"] = task.targets
        if self.plan.momentum is not None:
            state |= {f"momentum/{name}": torch.zeros_like(state[name]) for name in self.space.perturbations}
        return state | {f"witness/{name}": torch.zeros_like(state[name]) for name in self.witnesses}

    def step(self, victim: Victim, state: State) -> State:
        image, margin, ascent, state = self.look(victim, state)
        live = self._live(state)
        if self.plan.early_stop:
            self._note(state, image, margin)
        still = torch.stack([stands_still(part) for part in ascent.values()]).all(0)
        moved = self.space.advance(*self._with_momentum(state, ascent))
        for name in self.space.perturbations:
            put(moved[name], state[name], ~live)
        moved["zero_gradients"] = state["zero_gradients"] + live * still
        return moved | {name: state[name] + live for name in ("iteration", "forwards", "backwards")}

    def look(self, victim: Victim, state: State) -> tuple[Tensor, Tensor, State, State]:
        """The images of the iterates, their margins [n] (at most 0: broken), the gradient to climb by perturbation, and
        the state; one forward and one backward."""
        found: list[tuple[Tensor, Tensor]] = []

        def loss(image: Tensor) -> Tensor:
            out = self._logits(victim, image)
            found.append((image.detach(), out.detach()))
            if "aim" in state:
                return -error_log_odds(temper_logits(out, state["aim"]), state["aim"])
            return error_log_odds(temper_logits(out, state["target"]), state["target"])

        ascent, state = gradients(self.space, state, loss)
        image, logits = found[0]
        margin = goal_margins(logits, state["aim"]) if "aim" in state else margins(logits, state["y"])
        return image, margin, ascent, state

    def _logits(self, victim: Victim, image: Tensor) -> Tensor:
        """Logits [n,K] of the rendered images. Where a latent image leaves the box and its logits are not finite, those
        of the clipped image, with a straight-through gradient."""
        out = victim.differentiable(image)
        if self.space.admissible:
            return out
        lost = ~out.detach().isfinite().all(1)
        if not bool(lost.any()):
            return out
        clipped = image + (image.clamp(0.0, 1.0) - image).detach()
        return victim.differentiable(torch.where(per_sample(lost, image), clipped, image))

    def _live(self, state: State) -> Tensor:
        return ~state["broken"] & (state["iteration"] < self.iterations)

    def _note(self, state: State, image: Tensor, margin: Tensor) -> None:
        before = state["broken"]
        note(state, image.clamp(0.0, 1.0), margin, self.iterations)
        fresh = state["broken"] & ~before
        for name in self.witnesses:
            kept = state[f"witness/{name}"]
            state[f"witness/{name}"] = torch.where(per_sample(fresh, kept), state[name], kept)

    def leave(self, state: State) -> State:
        """Samples that were not broken return their last iterate."""
        broken = state["broken"]
        if bool(broken.all()):  # rendering a latent image costs a decode
            return state
        last, state = self.space.finish(state)
        state["adversarial"] = torch.where(per_sample(broken, last), state["adversarial"], last)
        for name in self.witnesses:
            kept = state[f"witness/{name}"]
            state[f"witness/{name}"] = torch.where(per_sample(broken, kept), kept, state[name])
        return state

    def _with_momentum(self, state: State, ascent: State) -> tuple[State, State]:
        if self.plan.momentum is None:
            return state, ascent
        moved: State = {}
        for name, gradient in ascent.items():
            moved[name] = self.plan.momentum * state[f"momentum/{name}"] + normalise(gradient, "l1")
        return {**state, **{f"momentum/{name}": value for name, value in moved.items()}}, moved


def search(
    victim: Victim, plan: SearchPlan, task: Task, name: str, witnesses: tuple[str, ...] = ()
) -> Candidates:
    """Run the restarts of `plan`, each on the samples that no earlier one broke; tensors on the victim's device.

    Noise is keyed by (seed, attack name, restart, sample id).
    """
    found = Candidates.unsearched(task.x, name)
    found.witness = _empty_witness(plan, task, witnesses)
    rows = torch.arange(len(task.x))
    for restart in range(plan.restarts):
        if not len(rows):
            break
        run_search(victim, GradientSearch(plan, name, restart, witnesses), task, found, rows)
        if restart + 1 < plan.restarts:
            rows = still_robust(victim, task, found, rows)
    return found


def _empty_witness(plan: SearchPlan, task: Task, witnesses: tuple[str, ...]) -> dict[str, Tensor]:
    noise = SampleNoise(task.seed, "shape", task.ids[:1], 0, task.x.device)
    sample = plan.space.start(task.x[:1], task.y[:1], noise)
    return {
        name: torch.zeros((len(task.x), *sample[name].shape[1:]), device=task.x.device) for name in witnesses
    }
