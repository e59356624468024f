"""The Python API: `robbench.evaluate` measures a model, `robbench.attack` makes adversarial images."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from robbench.attacks import build_attack
from robbench.attacks.trust.context import own_context
from robbench.attacks.trust.suspicions import RobbenchWarning
from robbench.core.device import resolve_device
from robbench.core.errors import UserError, python_arguments
from robbench.core.foreign import no_exit
from robbench.core.stops import listening
from robbench.evaluation.attacker import AttackedImages, Attacker, attack
from robbench.evaluation.inputs import Array, Data, read_inputs
from robbench.evaluation.measuring import (
    measure_in_folder,
    measure_in_memory,
    require_run_folder,
    show_progress,
)
from robbench.evaluation.planning import plan_run
from robbench.evaluation.request import Budgets, GivenFlow, flow_in_use, require_seed, resolve_attacks
from robbench.evaluation.result import COLUMNS, EvaluationResult, result_warnings
from robbench.evaluation.subject import Model, prepare
from robbench.evaluation.zoo import load_images, load_model

__all__ = [
    "COLUMNS",
    "AttackedImages",
    "Attacker",
    "EvaluationResult",
    "RobbenchWarning",
    "UserError",
    "attack",
    "evaluate",
    "load_images",
    "load_model",
]


def evaluate(
    model: Model,
    x: Data,
    y: Array | None = None,
    attacks: str | Sequence[str] = "pgd20,aa",
    *,
    n: int | None = None,
    dataset: str | None = None,
    epsilon: Budgets = None,
    eta: Budgets = None,
    flow: GivenFlow = None,
    seed: int = 0,
    device: str | torch.device = "auto",
    batch_size: int = 256,
    keep_images: bool = False,
    progress: bool = True,
    out: str | Path | None = None,
    fresh: bool = False,
    name: str | None = None,
) -> EvaluationResult:
    """Accuracy of `model` on clean images and under each attack.

    model: a module or function that maps images [N,C,H,W] in [0,1] to logits [N,K], or to something that holds them
    (`.logits`, `["logits"]`, the first element of a tuple). It is left as it was found.
    x, y: images in [0,1], or uint8, and integer labels [N]: tensors, NumPy arrays or lists. Or x alone: a data set, a
    DataLoader or another iterable of (image, label) pairs or (images, labels) batches, read once.
    attacks: names or groups (`robbench list attacks`), in a list or with commas between them.
    n: so many samples: drawn by `seed` from arrays and data sets with random access, of other iterables the first n.
    epsilon, eta: budgets, 0.031, "8/255" or several; dataset: whose budgets and default flow to use instead.
    flow: a flow or the name of one in the zoo, for latent and joint attacks. Sample i is keyed by (seed, i).
    device: "auto", "cpu", "cuda" or "cuda:N". batch_size: images at once.
    keep_images: keep every adversarial image. progress: show it on stderr.
    out: folder of the run, as `robbench run` writes one; the same call again computes nothing. fresh: put what is in it
    aside. name: of the model in its tables; None for that of its class.

    `UserError` in one line for what cannot be measured. What speaks against a number is a `RobbenchWarning` too, once.
    """
    what = f"evaluate: the model ({type(model).__qualname__}), the flow or an attack"
    with python_arguments(), listening(), no_exit(what), own_context():
        seed = require_seed(seed)
        specs = resolve_attacks(attacks, dataset, epsilon, eta)
        folder = _folder(out, fresh)
        resolve_device(str(device))
        found = flow_in_use(flow, dataset, specs, scored=folder is not None)
        built = [build_attack(spec, found.flow if found is not None else None) for spec in specs]
        inputs = read_inputs(x, y, n, seed)
        with prepare(model, inputs.images, device, batch_size, inputs.device) as subject:
            if found is not None:
                found.flow.to(subject.victim.device)
            plan = plan_run(subject, inputs, built, found, dataset, name, seed, keep_images)
            notes = (*inputs.notes, *subject.notes)
            with show_progress(plan, notes, progress) as shown:
                if folder is None:
                    measured = measure_in_memory(plan, subject.victim, shown, keep_images)
                else:
                    measured = measure_in_folder(plan, subject.victim, shown, folder, fresh, keep_images)
    for text in result_warnings(measured):
        warnings.warn(text, RobbenchWarning, stacklevel=2)
    return EvaluationResult(next(iter(plan.cards)), tuple(measured), notes, folder)


def _folder(out: str | Path | None, fresh: bool) -> Path | None:
    if out is None:
        if fresh:
            raise UserError(
                "fresh=True puts aside what is in out=, and no out= is given; leave it out, or give out="
            )
        return None
    if not isinstance(out, str | Path) or not str(out):
        raise UserError(f"out={out!r} is no folder; give a path, as in out='run'")
    folder = Path(out).expanduser()
    require_run_folder(folder)
    return folder
