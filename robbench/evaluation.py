"""`robbench.evaluate`: attack any model from Python and get a table, without zoo, cards or files."""

import warnings
from collections.abc import Sequence
from itertools import product
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from robbench.attacks import Outcome, Victim, build_attack
from robbench.attacks.suspicions import RobbenchWarning
from robbench.device import resolve_device
from robbench.errors import UserError
from robbench.metrics.accuracy import accuracy
from robbench.models.flows.base import Flow, FrozenFlow
from robbench.models.flows.checks import frozen_like
from robbench.models.loading import load_flow
from robbench.models.zoo import default_flow, find_model, zoo_entries
from robbench.specs import ResolvedAttack, refuse_unused_budgets, resolve_attack, threat_models

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["COLUMNS", "RobbenchWarning", "evaluate"]

Budgets = float | Sequence[float] | None
COLUMNS = (
    "attack",
    "threat_model",
    "epsilon",
    "eta",
    "accuracy",
    "lower",
    "upper",
    "n",
    "forwards",
    "backwards",
    "suspicions",
)


def evaluate(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    attacks: Sequence[str],
    *,
    dataset: str | None = None,
    epsilon: Budgets = None,
    eta: Budgets = None,
    flow: Flow | FrozenFlow | str | None = None,
    seed: int = 0,
    device: str = "auto",
    batch_size: int = 256,
) -> "pd.DataFrame":
    """Accuracy of `model` on clean images and under each attack.

    model: maps images [N,C,H,W] in [0,1] to logits [N,K]; it is moved to `device`; its modes and flags are as
    before afterwards. x: float images in [0,1]; y: labels [N]. attacks: names (`robbench list attacks`).
    dataset: whose budgets and default flow to use. epsilon, eta: budgets instead; several give a row each.
    flow: a flow or the name of one in the zoo, for latent and joint attacks. Sample i is keyed by (seed, i).

    Columns: attack, threat_model, epsilon, eta, accuracy, lower, upper (percent, 95 % Wilson interval), n,
    forwards, backwards (sums over samples), suspicions (what speaks against a number, "" for nothing; each is also a
    `RobbenchWarning`, once). First row "clean", last row "worst-case" (right under every one).
    """
    import pandas as pd

    target = resolve_device(device)
    specs = _resolved(attacks, dataset, _several(epsilon), _several(eta))
    frozen = _frozen(flow, dataset, target) if any(spec.needs_flow for spec in specs) else None
    built = [build_attack(spec, frozen) for spec in specs]
    victim, ids = Victim(model, target, batch_size), torch.arange(len(x))
    if not len(x):
        raise UserError("evaluate: x has no images; give at least one")
    outcomes = [attack.evaluate(victim, ids, x, y, seed=seed, batch_size=batch_size) for attack in built]
    rows = [_row(spec, outcome) for spec, outcome in zip(specs, outcomes, strict=True)]
    _warn(specs, outcomes)
    correct = outcomes[0].clean_predictions == outcomes[0].labels
    worst = torch.stack([outcome.robust for outcome in outcomes]).all(0)
    clean_row = {
        "attack": "clean",
        "threat_model": "clean",
        **_share(correct),
        "forwards": len(x),
        "backwards": 0,
        "suspicions": "",
    }
    worst_row = {"attack": "worst-case", "threat_model": "all", "suspicions": "", **_share(worst)}
    worst_row |= {key: sum(int(str(row[key])) for row in rows) for key in ("forwards", "backwards")}
    return pd.DataFrame([clean_row, *rows, worst_row], columns=list(COLUMNS))


def _several(budget: Budgets) -> tuple[float | None, ...]:
    if budget is None or isinstance(budget, int | float):
        return (budget,)
    return tuple(budget)


def _resolved(
    attacks: Sequence[str],
    dataset: str | None,
    epsilons: Sequence[float | None],
    etas: Sequence[float | None],
) -> list[ResolvedAttack]:
    if isinstance(attacks, str) or not attacks:
        raise UserError(f"evaluate: attacks={attacks!r}; give a list of names, as in ['pgd20', 'aa']")
    known = threat_models()
    found = [
        resolve_attack(name, dataset or "(none given)", known, epsilon, eta)
        for epsilon, eta, name in product(epsilons, etas, attacks)
    ]
    refuse_unused_budgets(found, *([b for b in given if b is not None] for given in (epsilons, etas)))
    return list({spec.label: spec for spec in found}.values())


def _frozen(
    flow: Flow | FrozenFlow | str | None, dataset: str | None, device: torch.device
) -> FrozenFlow | None:
    if isinstance(flow, FrozenFlow):
        return flow.to(device)
    if isinstance(flow, Flow):
        return frozen_like(flow).to(device)
    entries = zoo_entries()
    entry = find_model(flow, entries, "flow") if flow is not None else default_flow(dataset or "", entries)
    # Without one, the attack itself says which flow it needs and how to get it.
    return None if entry is None else load_flow(entry, device)


def _row(spec: ResolvedAttack, outcome: Outcome) -> dict[str, object]:
    return {
        "attack": spec.label,
        "threat_model": spec.threat_model,
        "epsilon": spec.epsilon,
        "eta": spec.eta,
        **_share(outcome.robust),
        "forwards": int(outcome.forwards.sum()),
        "backwards": int(outcome.backwards.sum()),
        "suspicions": "; ".join(one.text for one in outcome.suspicions),
    }


def _warn(specs: Sequence[ResolvedAttack], outcomes: Sequence[Outcome]) -> None:
    """A warning for every finding, with all attacks that share it, at the caller of `evaluate`."""
    attacks: dict[str, list[str]] = {}
    for spec, outcome in zip(specs, outcomes, strict=True):
        for one in outcome.suspicions:
            attacks.setdefault(one.text, []).append(spec.label)
    for text, labels in attacks.items():
        warnings.warn(f"{', '.join(labels)}: {text}", RobbenchWarning, stacklevel=3)


def _share(correct: Tensor) -> dict[str, object]:
    estimate = accuracy(correct.numpy())
    return {"accuracy": estimate.value, "lower": estimate.lower, "upper": estimate.upper, "n": estimate.n}
