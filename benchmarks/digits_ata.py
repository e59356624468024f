"""ATA of an attack on digits: the accuracies that UAR divides by (Kang et al. 2019, section 4).

A model is adversarially trained against the attack at each of its calibrated budgets (10 steps, a relative step size of
1/4, else the recipe of digits with half of its epochs, last epoch, seed 0), and attacked at all of them on the 360 test
images with the threat model's 200 steps. ATA at a budget is the best of their accuracies under attack. As in the paper,
the best of the models is chosen on the test images themselves. Prints the table and the line of
threat_models/unforeseen.yaml. What was trained and attacked already is not done again.

    python benchmarks/digits_ata.py --attack elastic --out DIR
"""

import argparse
import subprocess
import sys
from pathlib import Path

from robbench.metrics.verdicts import right_under_attack
from robbench.specs import resolve_attack, threat_models
from robbench.store.ledger import load_run

BUDGETS = range(1, 7)
SCHEDULE = ("steps=10", "recipe.epochs=60", "recipe.budget_warmup_epochs=15", "recipe.selection=last")


def robbench(*arguments: object) -> None:
    """Run the command; its output goes to stderr."""
    command = [sys.executable, "-m", "robbench", *map(str, arguments)]
    subprocess.run(command, check=True, stdout=sys.stderr)


def step_size(attack: str) -> float:
    """A quarter of the budget, with which ten steps cross the set."""
    return round(0.25 * float(resolve_attack(attack, "digits", threat_models()).epsilon or 0.0), 6)


def train(attack: str, zoo: Path) -> str:
    """Name of the model trained against `attack`, an attack at one of its calibrated budgets."""
    name = f"digits-at-{attack}"
    if not (zoo / name / "card.yaml").is_file():
        settings = [f"attack={attack}", f"step_size={step_size(attack)}", *SCHEDULE]
        changes = [word for setting in settings for word in ("--set", setting)]
        robbench("train", "--defense", "at", "--dataset", "digits", "--name", name, *changes, "--out", zoo)
    return name


def accuracies(folder: Path) -> dict[str, list[float]]:
    """Accuracy under attack in percent at each budget, by model; the cells of a run are in the order of its attacks."""
    found: dict[str, list[float]] = {}
    for result in load_run(folder).cells:
        share = 100.0 * float(right_under_attack(result.rows).mean())
        found.setdefault(result.cell.model, []).append(round(share, 1))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--attack", required=True, choices=("elastic", "uar-linf"))
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    zoo, run = arguments.out / "zoo", arguments.out / f"run-{arguments.attack}"
    attacks = [f"{arguments.attack}-{k}" for k in BUDGETS]
    models = [train(attack, zoo) for attack in attacks]
    robbench("run", "--zoo", zoo, "--model", ",".join(models), "--attacks", ",".join(attacks), "--out", run)
    table = accuracies(run)
    for model, row in table.items():
        print(f"{model}: {row}")
    best = [max(column) for column in zip(*table.values(), strict=True)]
    print(f'digits: {{accuracies: {best}, source: "benchmarks/digits_ata.py"}}')


if __name__ == "__main__":
    main()
