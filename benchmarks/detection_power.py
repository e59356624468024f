"""What the regression check sees of attacks broken on purpose: the table in docs/check.md.

    python benchmarks/detection_power.py [--n 60]

Runs digits-ijsat with the sound engine, then with every break of tests/test_broken_attacks.py, and says for each
attack which evidence shows it: the accuracy's 95 % interval (at this n and as if at n = 360), and the parts of the
paired check.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import test_broken_attacks as broken

from robbench.compare.comparison import Comparison
from robbench.compare.paired import RULES, compare_samples
from robbench.compare.samples import CellSamples, of_run
from robbench.statistics.accuracy import wilson
from robbench.store.ledger import load_run

EVIDENCE = {
    "inputs": ("before the attack differ", "labels differ"),
    "flips": ("verdicts flipped",),
    "ways": ("went another way",),
    "margins": ("of the changed scores",),
    "calls": ("on samples that hold",),
}


def seen_by_interval(before: CellSamples, after: CellSamples, n: int) -> bool:
    """Whether 0 is outside the 95 % interval of the difference (Newcombe) of two such accuracies at n samples."""
    rates = [float(cell.rows["robust"].mean()) for cell in (before, after)]
    low, high = sorted((wilson(round(rate * n), n) for rate in rates), key=lambda e: e.value)
    return high.value - low.value > ((high.value - high.lower) ** 2 + (low.upper - low.value) ** 2) ** 0.5


def evidence(results: list[Comparison], attack: str) -> str:
    reasons = " ".join(result.reason for result in results if result.attack == attack)
    return (
        ", ".join(name for name, texts in EVIDENCE.items() if any(text in reasons for text in texts))
        or "nothing"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=60)
    n = parser.parse_args().n
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sound = of_run(load_run(broken.run(folder / "sound", broken.CLASSIFIERS, n=n)))
        print(
            f"| break | attack | accuracy | interval, n = {n} | interval, n = 360 | default sees | interval sees |"
        )
        print("|---|---|---|---|---|---|---|")
        for number, (title, (breaks, attacks, _)) in enumerate(broken.BREAKS.items()):
            patch = pytest.MonkeyPatch()
            breaks(patch)
            found = of_run(load_run(broken.run(folder / str(number), attacks, n=n)))
            patch.undo()
            for attack in attacks.split(","):
                before, after = sound.cells[broken.MODEL, attack], found.cells[broken.MODEL, attack]
                values = " to ".join(f"{100 * cell.rows['robust'].mean():.1f}" for cell in (before, after))
                intervals = ("yes" if seen_by_interval(before, after, k) else "no" for k in (n, 360))
                policies = (
                    evidence(
                        [r for r in compare_samples(sound, found, policy) if r.verdict == "fail"], attack
                    )
                    for policy in RULES
                    if policy != "exact"
                )
                print(f"| {title} | {attack} | {values} | {' | '.join(intervals)} | {' | '.join(policies)} |")


if __name__ == "__main__":
    main()
