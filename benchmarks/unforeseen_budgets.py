"""Calibrate the six budgets of the unforeseen attacks on validation images (Kang et al. 2019, by other means).

Kang et al. choose budgets whose ATA matches that of Linf at six budgets (1 to 32 of 255), which takes a training per
attack and budget. Here the reference is the mean accuracy of the zoo's standard and `at` models under `uar-linf` at
1/8, 1/4, 1/2, 1, 5/4 and 3/2 of the data set's Linf budget (beyond, both are at 0), and a budget is read off, on a
logarithmic scale, where the same mean under the other attack is as high. Prints the accuracies and the line
`calibrated` of the YAML. The test set is not touched.

    python benchmarks/unforeseen_budgets.py --dataset digits [--data-dir DIR] [--n 180] [--steps 50]
"""

import argparse
from collections.abc import Sequence

import numpy as np
import torch

from robbench.attacks import Victim, build_attack
from robbench.core.errors import UserError
from robbench.data import load_dataset, sample_ids
from robbench.models.loading import load_model
from robbench.models.zoo import find_models, zoo_entries
from robbench.specs import resolve_attack, threat_models

FACTORS = (1 / 8, 1 / 4, 1 / 2, 1.0, 5 / 4, 3 / 2)
# Budgets tried: from the smallest one that can matter on small images to where every model fails.
RANGES = {
    "elastic": (0.06, 8.0),
    "jpeg-linf": (0.03, 16.0),
    "jpeg-l2": (0.25, 128.0),
    "jpeg-l1": (1.0, 4096.0),
    "uar-l2": (0.02, 8.0),
    "uar-l1": (0.05, 64.0),
    "fog": (8.0, 8192.0),
    "snow": (0.03, 8.0),
    "gabor": (1.0, 1600.0),
}
TRIED = 13


def accuracies(
    name: str,
    dataset: str,
    budgets: Sequence[float],
    victims: Sequence[Victim],
    x: torch.Tensor,
    y: torch.Tensor,
    steps: int,
) -> list[float]:
    """Mean accuracy under attack in percent at each budget, over the models."""
    known, found = threat_models(), []
    for epsilon in budgets:
        attack = build_attack(resolve_attack(name, dataset, known, epsilon=epsilon, steps=steps))
        shares = [
            float(
                attack.evaluate(v, torch.arange(len(x)), x, y, seed=0, batch_size=256)
                .under_attack.float()
                .mean()
            )
            for v in victims
        ]
        found.append(100 * sum(shares) / len(shares))
    return found


def read_off(wanted: float, budgets: Sequence[float], falling: Sequence[float]) -> float:
    """The smallest budget at which the accuracy, made monotone, has fallen to `wanted`; where it never does,
    that of the lowest accuracy."""
    monotone, first = np.unique(-np.minimum.accumulate(np.asarray(falling)), return_index=True)
    return float(np.exp(np.interp(-wanted, monotone, np.log(budgets)[first])))


def two_digits(value: float) -> float:
    """Rounded to two significant digits."""
    return float(f"{value:.2g}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--data-dir")
    parser.add_argument("--zoo")
    parser.add_argument("--n", type=int, default=180, help="validation images")
    parser.add_argument("--steps", type=int, default=50)
    arguments = parser.parse_args()
    dataset = load_dataset(arguments.dataset, arguments.data_dir)
    entries = zoo_entries(arguments.zoo)
    models = [find_models(defense, dataset.name, entries)[0] for defense in ("standard", "at")]
    victims = [Victim(load_model(entry).module) for entry in models]
    ids = sample_ids(dataset.validation, min(arguments.n, len(dataset.validation)), seed=0)
    x, y = dataset.validation.by_ids(ids)
    usual = float(resolve_attack("pgd20", dataset.name, threat_models()).epsilon or 0.0)
    linf = [factor * usual for factor in FACTORS]
    wanted = accuracies("uar-linf", dataset.name, linf, victims, x, y, arguments.steps)
    names = ", ".join(entry.card.name for entry in models)
    print(f"{dataset.name}: {len(ids)} validation images, {arguments.steps} steps, mean over {names}")
    print(f"  uar-linf {[round(value, 4) for value in linf]}: {[round(value, 1) for value in wanted]}")
    for name, (low, high) in RANGES.items():
        budgets = [float(value) for value in np.geomspace(low, high, TRIED)]
        try:
            falling = accuracies(name, dataset.name, budgets, victims, x, y, arguments.steps)
        except UserError as error:
            print(f"  {name}: {error}")
            continue
        chosen = [two_digits(read_off(value, budgets, falling)) for value in wanted]
        print(f"  {name} {[round(value, 4) for value in budgets]}: {[round(value, 1) for value in falling]}")
        print(f"  {name} calibrated {dataset.name}: {chosen}", flush=True)


if __name__ == "__main__":
    main()
