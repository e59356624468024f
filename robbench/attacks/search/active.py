"""The active set: one loop for iterative searches whose samples come and go.

A search is vectorised over samples that may be at different iterations. A sample leaves as soon as it is broken or
has had all its iterations, and its place is taken by a waiting sample, so that the device sees full batches and a
robust sample gets its full budget. Nothing here depends on order or batch size beyond rounding.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from robbench.attacks.search.geometry import put, surely_none
from robbench.attacks.search.progress import tell
from robbench.attacks.search.spaces import State
from robbench.attacks.search.task import Candidates, Task
from robbench.attacks.trust.suspicions import Diagnostics
from robbench.attacks.victim import Victim, chunks

CHECK_EVERY = 4  # steps between looks at who has finished, where looking makes the device wait
RESERVED = ("adversarial", "broken", "broken_at", "iteration", "forwards", "backwards", "zero_gradients")


class Search(ABC):
    """One search. Its state is a dictionary of tensors with the sample as first dimension; `RESERVED` entries:

    adversarial: the admissible image [n,C,H,W] to hand back if the sample left now. broken: [n] bool, a forward of
    that image was misclassified; broken_at: the iteration of it. iteration: [n] int64, iterations done. forwards,
    backwards: [n] int64, model calls. zero_gradients: [n] int64, those of the backwards whose gradient moved nothing.

    iterations: how many a robust sample gets; `step` makes one for every sample and must not synchronise with the
    device. A sample that has finished may stay for a few steps more: `note` leaves its results alone. witnesses: state
    entries "witness/NAME" from which a latent image is decoded again. claims_only: "broken" must be confirmed by a
    forward of `adversarial`; who is not goes on.
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
        """One iteration for every sample; `iteration`, `forwards` and `backwards` grow accordingly."""

    def leave(self, state: State) -> State:
        """Last word on samples that leave, for searches that settle `adversarial` only then."""
        return state


def fresh_state(x: Tensor) -> State:
    """`RESERVED` entries of samples nothing has happened to yet; x [n,C,H,W] is their image."""
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
    """Write down, in place, who was broken by admissible `images` [n,C,H,W] with margins [n] of a forward of exactly
    these. A sample broken before, or past its last iteration, keeps what it has."""
    misclassified = margin <= 0
    if surely_none(misclassified):
        return
    fresh = misclassified & ~state["broken"] & (state["iteration"] <= iterations)
    put(state["adversarial"], images, fresh)
    state["broken_at"] = torch.where(fresh, state["iteration"], state["broken_at"])
    state["broken"] = state["broken"] | fresh


def run_search(victim: Victim, search: Search, task: Task, found: Candidates, rows: Tensor) -> None:
    """Run `search` on `rows` of the task ([m], on the CPU) and write what comes of it into `found`.

    `found.step` becomes the iteration at which a sample was broken, `search.iterations` for the others.
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
            continue  # some may be broken already, and make room for others
        for _ in range(period if len(places) else 0):
            state = search.step(victim, state)


def _without_finished(
    victim: Victim, search: Search, found: Candidates, state: State, places: Tensor
) -> tuple[State, Tensor]:
    """The samples that go on; the others are recorded."""
    if search.claims_only or victim.must_confirm:
        _confirm(victim, state)
    done = state["broken"] | (state["iteration"] >= search.iterations)
    leaving = done.cpu()
    if not bool(leaving.any()):
        return state, places
    _record(search, found, search.leave({n: value[done] for n, value in state.items()}), places[leaving])
    return {n: value[~done] for n, value in state.items()}, places[~leaving]


def _confirm(victim: Victim, state: State) -> None:
    """Take back what a forward of the image itself does not confirm."""
    claimed = state["broken"].nonzero().squeeze(1)
    if not len(claimed):
        return
    right = victim.margins(state["adversarial"][claimed], state["y"][claimed]) > 0
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
    """The `rows` whose image in `found` a clean forward classifies correctly (counted)."""
    kept = []
    for part in chunks(rows, task.batch_size):
        where = part.to(task.x.device)
        right = victim.margins(found.adversarial[where], task.y[where]) > 0
        found.forwards[part] += victim.draws
        kept.append(part[right.cpu()])
    return torch.cat(kept) if kept else rows
