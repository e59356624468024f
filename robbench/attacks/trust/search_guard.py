"""What a search may neither return nor leave behind, because anybody may write one."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from robbench.attacks.named import NamedAttack
from robbench.attacks.search.task import Candidates
from robbench.attacks.trust.context import refuse_other_modes, torch_modes
from robbench.attacks.victim import Victim
from robbench.core.errors import AttackViolation
from robbench.specs import ResolvedAttack

# Forwards of images that a search makes for one that it reports: a batch may hold samples that are done with.
UNREPORTED = 2
HELD = ("spec", "parameters", "flow", "guard")  # what a verdict is judged by, of an attack
FREE = ("_classes",)  # what a forward may set of a victim


@contextmanager
def nothing_else_changed(attack: NamedAttack, victim: Victim) -> Iterator[None]:
    """`AttackViolation` where a search inside changes the attack's threat model, parameters or flow, or the victim with
    which verdicts are found; `UserError` where it leaves torch in another mode."""
    modes = torch_modes()
    spec, held = attack.spec.model_copy(deep=True), {name: getattr(attack, name, None) for name in HELD}
    tools = {name: value for name, value in vars(victim).items() if name not in FREE}
    yield
    changed = [name for name, value in held.items() if getattr(attack, name, None) is not value]
    changed += [f"victim.{name}" for name in _differing(tools, vars(victim))]
    if changed or attack.spec != spec:
        raise AttackViolation(
            f"attack {spec.label!r} changed {', '.join(changed) or 'spec'} during its search, by which it is judged; "
            f"let `search` leave the attack and the victim as they are"
        )
    refuse_other_modes(modes, f"the search of attack {spec.label!r}")


def _differing(before: dict[str, object], after: dict[str, object]) -> list[str]:
    return [name for name in before | after if name not in FREE and before.get(name) is not after.get(name)]


def require_candidates(spec: ResolvedAttack, found: object, n: int) -> Candidates:
    """`found`; `AttackViolation` unless it is `Candidates` whose columns have a row for each of n samples, with the
    name of a part of the attack and counts of at least 0."""
    if not isinstance(found, Candidates) or not isinstance(found.adversarial, Tensor):
        raise AttackViolation(
            f"the search of attack {spec.label!r} returned {type(found).__name__}; return robbench.attacks.Candidates"
        )
    for name in ("step", "forwards", "backwards"):
        column = getattr(found, name)
        whole = isinstance(column, Tensor) and not column.is_floating_point() and column.shape == (n,)
        if not whole or (n and int(column.min()) < (-1 if name == "step" else 0)):
            raise _wrong(spec, name, f"{n} integers of at least {-1 if name == 'step' else 0}")
    if found.claimed is not None and found.claimed.shape != (n,):
        raise _wrong(spec, "claimed", f"{n} booleans")
    known = {spec.name, *_components(spec)}
    if len(found.component) != n or not known.issuperset(found.component):
        raise _wrong(spec, "component", f"{n} names out of {', '.join(sorted(known))}")
    return found


def require_counts(spec: ResolvedAttack, found: Candidates, searched: int) -> None:
    """`AttackViolation` where `found` reports far fewer forwards of images than the search made, `searched`. Counts
    that are means over a batch are not held to it."""
    reported = int(found.forwards.sum())
    if found.counts_exact and searched > UNREPORTED * reported:
        raise AttackViolation(
            f"attack {spec.label!r} reports {reported} forwards of images and made {searched}; count every call of "
            f"the model in `forwards`"
        )


def steps_of(spec: ResolvedAttack, found: Candidates, broken: Tensor) -> Tensor:
    """Step at which each `broken` [N] sample was broken, [N]: all its forwards or
    steps where the search does not know it.
    `AttackViolation` for a step beyond the last one of its attack."""
    last = torch.tensor([spec.last_step(name) for name in found.component], dtype=torch.float64)
    limit = torch.where(last.isnan(), found.forwards, last).long()
    if bool((broken & (found.step > limit)).any()):
        raise _wrong(spec, "step", "the step that broke a sample, at most the number of steps or calls")
    return torch.where(found.step < 0, torch.minimum(found.forwards, limit), found.step)


def _components(spec: ResolvedAttack) -> tuple[str, ...]:
    parts = spec.parameters.get("components")
    return tuple(parts) if isinstance(parts, list | tuple) else ()


def _wrong(spec: ResolvedAttack, column: str, accepted: str) -> AttackViolation:
    return AttackViolation(
        f"the search of attack {spec.label!r} returned a wrong `{column}`; return {accepted}"
    )
