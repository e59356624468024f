"""Choose a latent budget on validation images: the latent part alone moves the image as far as the image budget does.

Bisects eta until `om-pgd` (zoo's `at` model, no early stop) moves the images as far as the data set's Linf budget does:
  --measure linf   mean largest pixel change = epsilon               (threat models latent-linf and joint)
  --measure l2     mean Euclidean distance = that of pgd50           (threat models flow-lp-*: larger)
The test set is not touched. Prints one line a step.

    python benchmarks/latent_budget.py --dataset digits --measure linf [--data-dir DIR] [--n 180]
"""

import argparse

import torch

from robbench.attacks import Victim, build_attack
from robbench.data import load_dataset, sample_ids
from robbench.models.flows.base import FrozenFlow
from robbench.models.loading import load_flow, load_model
from robbench.models.zoo import default_flow, find_models, zoo_entries
from robbench.specs import ResolvedAttack, resolve_attack, threat_models


def distances(
    spec: ResolvedAttack, victim: Victim, flow: FrozenFlow, ids: list[int], x: torch.Tensor, y: torch.Tensor
) -> tuple[float, float]:
    """Mean Linf and mean L2 distance of the attack's last iterates from the images."""
    spec = spec.model_copy(update={"parameters": {**spec.parameters, "early_stop": False}})
    attack = build_attack(spec, flow)
    outcome = attack.evaluate(victim, torch.tensor(ids), x, y, seed=0, batch_size=256)
    return float(outcome.linf.mean()), float(outcome.l2.mean())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--data-dir")
    parser.add_argument("--zoo")
    parser.add_argument("--measure", choices=("linf", "l2"), default="linf")
    parser.add_argument("--n", type=int, default=180, help="validation images")
    arguments = parser.parse_args()
    dataset = load_dataset(arguments.dataset, arguments.data_dir)
    entries = zoo_entries(arguments.zoo)
    model = load_model(find_models("at", dataset.name, entries)[0]).module
    entry = default_flow(dataset.name, entries)
    if entry is None:
        raise SystemExit(f"the zoo has no flow for {dataset.name}; train one: robbench train --defense clean")
    flow = load_flow(entry)
    ids = sample_ids(dataset.validation, min(arguments.n, len(dataset.validation)), seed=0)
    x, y = dataset.validation.by_ids(ids)
    victim = Victim(model)
    models = threat_models()
    pgd = resolve_attack("pgd50", dataset.name, models)
    column = ("linf", "l2").index(arguments.measure)
    reached = distances(pgd, victim, flow, ids, x, y)
    target = (float(pgd.epsilon or 0.0), reached[1])[column]
    print(
        f"{dataset.name}: om-pgd should move {len(ids)} validation images by {target:.4f} (mean {arguments.measure})"
    )
    low, high = 0.0, 1.0
    for _ in range(12):
        eta = (low + high) / 2
        moved = distances(resolve_attack("om-pgd", dataset.name, models, eta=eta), victim, flow, ids, x, y)
        print(f"  eta {eta:.4f}: Linf {moved[0]:.4f}, L2 {moved[1]:.4f}")
        low, high = (eta, high) if moved[column] < target else (low, eta)
    print(f"eta {(low + high) / 2:.3f}")


if __name__ == "__main__":
    main()
