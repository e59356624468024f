"""The active set: one loop for iterative searches over samples at different iterations.

A sample leaves the batch as soon as it is broken or has used all its iterations, and a waiting sample takes its place:
batches stay full, and every robust sample gets its full budget. Results do not depend on order or batch size beyond
rounding.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from robbench.attacks.search.geometry import known_empty, put
from robbench.attacks.search.progress import tell
from robbench.attacks.search.spaces import State
from robbench.attacks.search.task import Candidates, Task
from robbench.attacks.trust.suspicions import Diagnostics
from robbench.attacks.victim import Victim, chunks

CHECK_EVERY = (
    4  # steps on a GPU between checks which samples have finished, since each check waits for the device
)
RESERVED = ("adversarial", "broken", "broken_at", "iteration", "forwards", "backwards", "zero_gradients")


class Search(ABC):
    """One iterative search. Its state is a dictionary of tensors with the sample as first dimension.

    `RESERVED` entries of the state: adversarial: the admissible image [n,C,H,W] to return if the sample left now.
    broken: [n] bool, a forward misclassified that image (as the state's "aim" [n], where there is one); broken_at: at
    which iteration. iteration: [n] int64, iterations done. forwards, backwards: [n] int64, model calls. zero_gradients:
    [n] int64, backwards whose gradient was zero everywhere. A finished sample may stay for a few more steps, in which
    `note` does not change its results.

    Attributes:
        name: of the attack, part of the key of its random numbers.
        iterations: of a robust sample.
        witnesses: state entries "witness/NAME" from which a latent image is decoded again.
        claims_only: "broken" must be confirmed by a forward of `adversarial`; a sample not confirmed searches on.
    """

    name: str
    iterations: int
    witnesses: tuple[str, ...] = ()
    claims_only: bool = False

    @abstractmethod
    def begin(self, victim: Victim, task: Task) -> State:
        """State of fresh samples, all `RESERVED` entries included (see `fresh_state`)."""

    @abstractmethod
    def step(self, victim: Victim, state: State) -> State:
        """One iteration for every sample, its calls counted; must not synchronise with the device."""

    def leave(self, state: State) -> State:
        """State of samples that leave, for searches that set `adversarial` only at the end."""
        return state


def fresh_state(x: Tensor) -> State:
    """`RESERVED` entries before the first iteration, for clean images x [n,C,H,W]."""
    zeros = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    return {
        "adversarial": x.clone(),
        "broken": torch.zeros_like(zeros, dtype=torch.bool),
        "broken_at": zeros.clone(),
        "iteration": zeros,
        "forwards": zeros.clone(),
        "backwards": zeros.clone(),
        "zero_gradients": zeros.clone(),
    }


def note(state: State, images: Tensor, margin: Tensor, iterations: int) -> None:
    """Record in place which samples the admissible `images` [n,C,H,W] break, given the margins [n] of a forward of
    exactly these images. Samples broken before, or past their last iteration, do not change."""
    misclassified = margin <= 0
    if known_empty(misclassified):
        return
    fresh = misclassified & ~state["broken"] & (state["iteration"] <= iterations)
    put(state["adversarial"], images, fresh)
    state["broken_at"] = torch.where(fresh, state["iteration"], state["broken_at"])
    state["broken"] = state["broken"] | fresh


def run_search(victim: Victim, search: Search, task: Task, found: Candidates, rows: Tensor) -> None:
    """Run `search` on `rows` of the task ([m], on the CPU) and write its results into `found`.

    `found.step` becomes the iteration at which a sample was broken, or `search.iterations`.
    """
    size = victim.forward.batch(task.batch_size)
    state, places = _begin(victim, search, task, rows[:size])
    waiting = rows[size:]
    period = 1 if victim.device.type == "cpu" else CHECK_EVERY
    while len(places):
        state, places = _without_finished(victim, search, found, state, places)
        missing = size - len(places)
        # A few free places are not worth a batch of their own.
        if len(waiting) and (not len(places) or missing >= max(1, size // 8)):
            fresh, taken = _begin(victim, search, task, waiting[:missing])
            waiting = waiting[missing:]
            state = {n: torch.cat([state[n], fresh[n]]) for n in fresh} if len(places) else fresh
            places = torch.cat([places, taken])
            continue  # some may be broken at the start and leave at once
        for _ in range(period if len(places) else 0):
            state = search.step(victim, state)


def _without_finished(
    victim: Victim, search: Search, found: Candidates, state: State, places: Tensor
) -> tuple[State, Tensor]:
    """State and places of the samples that search on; results of the finished ones are recorded."""
    if search.claims_only or victim.must_confirm:
        _confirm(victim, state)
    done = state["broken"] | (state["iteration"] >= search.iterations)
    leaving = done.cpu()
    if not bool(leaving.any()):
        return state, places
    _record(search, found, search.leave({n: value[done] for n, value in state.items()}), places[leaving])
    return {n: value[~done] for n, value in state.items()}, places[~leaving]


def _confirm(victim: Victim, state: State) -> None:
    """Reset "broken" where a forward of the image itself classifies it correctly."""
    claimed = state["broken"].nonzero().squeeze(1)
    if not len(claimed):
        return
    aims = state["aim"][claimed] if "aim" in state else None
    right = victim.margins(state["adversarial"][claimed], state["y"][claimed], aims) > 0
    state["forwards"][claimed] += victim.draws
    state["broken"][claimed[right]] = False


def _begin(victim: Victim, search: Search, task: Task, rows: Tensor) -> tuple[State, Tensor]:
    return search.begin(victim, task.part(rows)), rows


def _record(search: Search, found: Candidates, state: State, rows: Tensor) -> None:
    where = rows.to(found.adversarial.device)
    found.adversarial[where] = state["adversarial"]
    step = torch.where(state["broken"], state["broken_at"], state["iteration"].clamp(max=search.iterations))
    found.step[rows] = step.cpu()
    found.forwards[rows] += state["forwards"].cpu()
    found.backwards[rows] += state["backwards"].cpu()
    if found.claimed is None:
        found.claimed = torch.zeros(len(found.step), dtype=torch.bool)
    found.claimed[rows] = state["broken"].cpu()
    tell(done=int(found.claimed[rows].sum()))
    found.diagnostics += Diagnostics(
        gradients=int(state["backwards"].sum()), zero_steps=int(state["zero_gradients"].sum())
    )
    for name in found.witness:
        found.witness[name][where] = state[f"witness/{name}"]


def still_robust(victim: Victim, task: Task, found: Candidates, rows: Tensor) -> Tensor:
    """The `rows` whose image in `found` a clean forward, which is counted, classifies correctly; of a targeted attack,
    those that have not reached their target."""
    kept = []
    for part in chunks(rows, task.batch_size):
        where = part.to(task.x.device)
        aims = None if task.targets is None else task.targets[where]
        right = victim.margins(found.adversarial[where], task.y[where], aims) > 0
        found.forwards[part] += victim.draws
        kept.append(part[right.cpu()])
    return torch.cat(kept) if kept else rows
