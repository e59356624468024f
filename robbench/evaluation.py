"""`robbench.evaluate`: attack any model from Python and get a table, without zoo, cards or files."""

import warnings
from collections.abc import Callable, Sequence
from itertools import product
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from robbench.attacks import Outcome, Victim, build_attack
from robbench.attacks.trust.context import own_context
from robbench.attacks.trust.suspicions import RobbenchWarning
from robbench.core.device import resolve_device
from robbench.core.errors import UserError
from robbench.core.foreign import no_exit
from robbench.core.stops import listening
from robbench.models.flows.base import Flow, FrozenFlow
from robbench.models.flows.checks import frozen_like
from robbench.models.functions import as_module
from robbench.models.loading import load_flow
from robbench.models.zoo import default_flow, find_model, zoo_entries
from robbench.specs import ResolvedAttack, refuse_unused_budgets, resolve_attack, threat_models
from robbench.statistics.accuracy import accuracy

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["COLUMNS", "RobbenchWarning", "evaluate"]

Budgets = float | Sequence[float] | None
Array = Tensor | np.ndarray | Sequence[object]
COLUMNS = (
    "attack",
    "threat_model",
    "epsilon",
    "eta",
    "measure",
    "accuracy",
    "lower",
    "upper",
    "robust_accuracy",
    "n",
    "forwards",
    "backwards",
    "suspicions",
)


def evaluate(
    model: nn.Module | Callable[[Tensor], Tensor],
    x: Array,
    y: Array,
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

    model: a module or function that maps images [N,C,H,W] in [0,1] to logits [N,K]; a module is moved to `device`; its
    modes and flags are as before afterwards. x: float images in [0,1]; y: integer labels [N]; tensors, NumPy arrays or
    lists of them. attacks: names (`robbench list attacks`).
    dataset: whose budgets and default flow to use. epsilon, eta: budgets instead; several give a row each.
    flow: a flow or the name of one in the zoo, for latent and joint attacks. Sample i is keyed by (seed, i).

    Columns: attack, threat_model, epsilon, eta, measure, accuracy, lower, upper (percent, 95 % Wilson interval),
    robust_accuracy, n, forwards, backwards (sums over samples), suspicions (what speaks against a number, "" for
    nothing; each is also a `RobbenchWarning`, once). measure says what `accuracy` counts: "robust accuracy", right on
    the clean image and under attack; of perturbations (R-LA, A-LA against the prediction) "accuracy under attack",
    right on the attacked image. First row "clean", last row "worst-case": right without attack and under every attack
    but the perturbations, NaN where there are only these.
    """
    with listening(), no_exit(f"evaluate: the model ({type(model).__qualname__}), the flow or an attack"):
        return _evaluated(model, x, y, attacks, dataset, epsilon, eta, flow, seed, device, batch_size)


def _evaluated(
    model: nn.Module | Callable[[Tensor], Tensor],
    x: Array,
    y: Array,
    attacks: Sequence[str],
    dataset: str | None,
    epsilon: Budgets,
    eta: Budgets,
    flow: Flow | FrozenFlow | str | None,
    seed: int,
    device: str,
    batch_size: int,
) -> "pd.DataFrame":
    if not len(x):
        raise UserError("evaluate: x has no images; give at least one")
    with own_context():
        specs = _resolved(attacks, dataset, _several(epsilon), _several(eta))
        target = resolve_device(device)
        frozen = _frozen(flow, dataset, target) if any(spec.needs_flow for spec in specs) else None
        built = [build_attack(spec, frozen) for spec in specs]
        images, labels = _tensor("x", x), _tensor("y", y)
        victim, ids = Victim(as_module(model), target, batch_size), torch.arange(len(images))
        outcomes = [attack.evaluate(victim, ids, images, labels, seed, batch_size) for attack in built]
    _warn(specs, outcomes)
    return _table([attack.spec for attack in built], outcomes)


def _tensor(name: str, values: Array) -> Tensor:
    """Images or labels as a tensor; `UserError` for what is none."""
    try:
        return values if isinstance(values, Tensor) else torch.as_tensor(np.asarray(values))
    except (TypeError, ValueError) as error:
        raise UserError(
            f"evaluate: {name} is no array ({' '.join(str(error).split())[:100]}); give a tensor, a NumPy array or a "
            f"list of numbers"
        ) from error


def _table(specs: Sequence[ResolvedAttack], outcomes: Sequence[Outcome]) -> "pd.DataFrame":
    """A row for the clean images, one per attack, and one for the worst case over all of them."""
    import pandas as pd

    rows = [_row(spec, outcome) for spec, outcome in zip(specs, outcomes, strict=True)]
    correct = outcomes[0].clean_margins > 0
    strict = [o.robust for spec, o in zip(specs, outcomes, strict=True) if spec.semantics == "worst-case"]
    worst = _share(torch.stack(strict).all(0)) if strict else {"n": len(correct)}
    clean_row = {
        "attack": "clean",
        "threat_model": "clean",
        "measure": "accuracy",
        **_share(correct),
        "forwards": len(correct),
        "backwards": 0,
        "suspicions": "",
    }
    worst_row = {
        "attack": "worst-case",
        "threat_model": "all",
        "measure": "robust accuracy",
        "suspicions": "",
        **worst,
    }
    worst_row["robust_accuracy"] = worst_row.get("accuracy")
    worst_row |= {key: sum(int(str(row[key])) for row in rows) for key in ("forwards", "backwards")}
    return pd.DataFrame([clean_row, *rows, worst_row], columns=list(COLUMNS))


def _several(budget: Budgets) -> tuple[float | None, ...]:
    if budget is None or isinstance(budget, int | float | np.number):
        return (None if budget is None else float(budget),)
    if isinstance(budget, str):
        raise UserError(
            f"evaluate: budget {budget!r} is a text; give a number in [0,1] pixels, as in 8 / 255"
        )
    return tuple(float(one) for one in budget)


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
        "measure": spec.measure,
        **_share(outcome.under_attack if spec.semantics == "perturbation" else outcome.robust),
        "robust_accuracy": _share(outcome.robust)["accuracy"],
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
        warnings.warn(f"{', '.join(labels)}: {text}", RobbenchWarning, stacklevel=4)


def _share(correct: Tensor) -> dict[str, object]:
    estimate = accuracy(correct.numpy())
    return {"accuracy": estimate.value, "lower": estimate.lower, "upper": estimate.upper, "n": estimate.n}
