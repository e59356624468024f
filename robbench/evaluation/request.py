"""What a call of the Python API asks for: attacks, budgets and the flow, resolved before anything is computed."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import product
from numbers import Real
from typing import Any

import numpy as np
from torch import Tensor

from robbench.attacks.checks import check_seed
from robbench.cards import Architecture, ModelCard, Weights
from robbench.core.errors import UserError, spell_argument, unknown_name
from robbench.core.numerals import number
from robbench.data.names import dataset_names
from robbench.evaluation.subject import fingerprint
from robbench.models.flows.base import Flow, FrozenFlow
from robbench.models.flows.checks import frozen_like
from robbench.models.loading import load_flow
from robbench.models.zoo import default_flow, find_model, zoo_entries
from robbench.specs import (
    ResolvedAttack,
    expand_groups,
    refuse_unused_budgets,
    resolve_attack,
    threat_models,
    without_clean,
)

Budget = float | str
Budgets = Budget | Sequence[Budget] | None
GivenFlow = Flow | FrozenFlow | str | None


@dataclass(frozen=True)
class FlowInUse:
    """A flow that attacks search through, and its card; of a flow that is no zoo model, one that was made up."""

    flow: FrozenFlow
    card: ModelCard


def resolve_attacks(
    attacks: str | Sequence[str],
    dataset: str | None,
    epsilon: Budgets,
    eta: Budgets,
    target: str | int | None = None,
) -> list[ResolvedAttack]:
    """Every attack under every budget, each once. attacks: names or groups, in a list or with commas between them;
    target: of targeted attacks."""
    epsilons, etas = read_budgets("epsilon", epsilon), read_budgets("eta", eta)
    if dataset is not None and dataset not in dataset_names():
        raise unknown_name(
            "data set", str(dataset), dataset_names(), "or leave dataset= out and give epsilon="
        )
    known = threat_models()
    names = expand_groups(without_clean(_names(attacks)), known)
    found = [
        resolve_attack(name, dataset or "", known, one_epsilon, one_eta, target=target)
        for one_epsilon, one_eta, name in product(epsilons or (None,), etas or (None,), names)
    ]
    refuse_unused_budgets(found, epsilons, etas)
    return list({spec.label: spec for spec in found}.values())


def _names(attacks: str | Sequence[str]) -> list[str]:
    given = [attacks] if isinstance(attacks, str) else list(attacks) if hasattr(attacks, "__iter__") else []
    if not given or not all(isinstance(name, str) for name in given):
        raise UserError(
            f"attacks={attacks!r}; give names (robbench list attacks), as in 'pgd20,aa' or ['pgd20', 'aa']"
        )
    names = [part.strip() for name in given for part in name.split(",") if part.strip()]
    if not names:
        raise UserError(f"attacks={attacks!r} names none; give some, as in 'pgd20,aa'")
    return list(dict.fromkeys(names))


def read_budgets(name: str, given: Budgets) -> tuple[float, ...]:
    """Budgets as numbers: of a number, a text ("8/255", "0.1,8/255") or several of these."""
    if given is None:
        return ()
    if isinstance(given, Tensor | np.ndarray):
        given = given.tolist()
    several = [given] if isinstance(given, str | Real) or not hasattr(given, "__iter__") else list(given)
    parts = [part for one in several for part in (one.split(",") if isinstance(one, str) else [one])]
    if not parts:
        raise UserError(f"{name}={given!r} has no budget; give a number or several, as in {name}=8/255")
    return tuple(dict.fromkeys(_budget(name, part) for part in parts))


def _budget(name: str, part: object) -> float:
    value = number(part) if isinstance(part, str) else part
    if isinstance(value, bool) or not isinstance(value, Real):
        raise UserError(
            f"{spell_argument(name, repr(part))} is not a budget; give a finite number of at least 0, as in 0.1, "
            f"8/255 or '8/255'"
        )
    return float(value)


def flow_in_use(
    flow: GivenFlow, dataset: str | None, specs: Sequence[ResolvedAttack], scored: bool
) -> FlowInUse | None:
    """The flow of the latent and joint attacks among `specs`, on the CPU; None where there are none. Without one given,
    that of the data set in the zoo. scored: whether a flow that is given also scores images in bits/dim."""
    needed = any(spec.needs_flow for spec in specs)
    if not needed and flow is not None and not scored:
        raise UserError(
            "flow= changes none of these attacks; leave it out, or ask for a latent or joint attack (robbench list "
            "attacks)"
        )
    if flow is None and not needed:
        return None
    if isinstance(flow, Flow | FrozenFlow):
        frozen = (
            deepcopy(flow) if isinstance(flow, FrozenFlow) else frozen_like(flow)
        )  # the caller's stays where it is
        return FlowInUse(frozen, _card_of_flow(frozen))
    if flow is not None and not isinstance(flow, str):
        raise UserError(
            f"flow is of type {type(flow).__name__}; give the name of a flow in the zoo (robbench list models) or a "
            f"robbench.models.flows.base.Flow"
        )
    entries = zoo_entries()
    entry = find_model(flow, entries, "flow") if flow is not None else default_flow(dataset or "", entries)
    # Without one, the attack itself says which flow it needs and how to get it.
    return None if entry is None else FlowInUse(load_flow(entry), entry.card)


def _card_of_flow(flow: FrozenFlow) -> ModelCard:
    name = type(flow).__name__
    return ModelCard(
        name=name,
        kind="flow",
        description="a flow given from Python",
        dataset="arrays",
        defense="unknown",
        architecture=Architecture(name="python", arguments={"class": name}),
        input_shape=flow.input_shape,
        grey_levels=flow.grey_levels,
        weights=Weights(file="python", sha256=fingerprint(flow)),
    )


def require_seed(seed: Any) -> int:
    """`seed` as an int; NumPy's integers are fine. `UserError` for what is none of at least 0."""
    whole = hasattr(seed, "__index__") and not isinstance(seed, bool)
    return check_seed(int(seed) if whole else seed)
