"""The tables of docs/results-*.md and docs/likelihood.md, from the CSV files of reports/leaderboard.

    python benchmarks/result_tables.py            # write them
    python benchmarks/result_tables.py --check    # exit 1 where a table is not what the CSV says

A table stands below a comment `<!-- accuracy: FILE ATTACK,... MODEL,... -->` (percent and 95 % Wilson interval of
`FILE.csv`), `<!-- bits: FILE ATTACK MODEL,... -->` (mean bits/dim, half of its 95 % interval, and the median),
`<!-- distance: FILE ATTACK,... MODEL,... -->` (median distance and its 95 % interval) or
`<!-- paired: FILE,... ATTACK,... A,B -->` (from the bundles FILE.zip: accuracies of two models, their difference on the
same images with its 95 % interval, and p of the exact sign test, adjusted by Holm over the table).
"""

import re
import sys
from pathlib import Path

import pandas as pd

from robbench.bundle.runs import open_runs
from robbench.metrics.minimal_norm import MEDIAN_DISTANCE
from robbench.metrics.verdicts import shown_verdicts
from robbench.statistics.accuracy import Verdicts
from robbench.statistics.paired import holm, paired

ROOT = Path(__file__).parents[1]
PAGES = (
    "docs/results-digits.md", "docs/results-fashionmnist.md", "docs/results-unforeseen.md", "docs/likelihood.md",
)  # fmt: skip
PLACE = re.compile(
    r"<!-- (accuracy|bits|distance|paired): (\S+) (\S+) (\S+) -->\n\n(?:\|.*\n)*", re.MULTILINE
)


def accuracy_table(rows: pd.DataFrame, attacks: list[str], models: list[str]) -> str:
    """Models down, attacks across: 73.1 [68, 77]."""
    return _interval_table(rows[rows["metric"] == "accuracy"], attacks, models, "{:.1f} [{:.0f}, {:.0f}]")


def distance_table(rows: pd.DataFrame, attacks: list[str], models: list[str]) -> str:
    """Models down, attacks across: 1.03 [0.98, 1.07]."""
    medians = rows[rows["metric"] == MEDIAN_DISTANCE.name]
    return _interval_table(medians, attacks, models, "{:.3g} [{:.3g}, {:.3g}]")


def _interval_table(rows: pd.DataFrame, attacks: list[str], models: list[str], shape: str) -> str:
    """shape: of value, lower and upper bound."""
    table = rows.set_index(["model", "attack"])[["value", "lower", "upper"]]
    lines = ["| model | " + " | ".join(attacks) + " |", "|---" * (len(attacks) + 1) + "|"]
    for model in models:
        texts = [shape.format(*table.loc[(model, attack)]) for attack in attacks]
        lines.append(f"| {model} | " + " | ".join(texts) + " |")
    return "\n".join(lines) + "\n"


def bits_table(rows: pd.DataFrame, attacks: list[str], models: list[str]) -> str:
    """Budgets down, flows across: 3.114 ± 0.013 [3.118]."""
    found = rows[rows["attack"].str.partition("@")[0].isin(attacks)]
    means = found[found["metric"] == "bits_per_dim"].set_index(["epsilon", "model"])
    medians = found[found["metric"] == "bits_per_dim_median"].set_index(["epsilon", "model"])
    lines = ["| epsilon of 255 | " + " | ".join(models) + " |", "|---" * (len(models) + 1) + "|"]
    for epsilon in sorted(found["epsilon"].unique()):
        texts = []
        for model in models:
            cell, median = means.loc[(epsilon, model)], medians.loc[(epsilon, model), "value"]
            digits = 3 if cell["value"] < 10 else 2
            half = (cell["upper"] - cell["lower"]) / 2
            texts.append(f"{cell['value']:.{digits}f} ± {half:.{digits}f} [{median:.{digits}f}]")
        lines.append(f"| {epsilon:g} | " + " | ".join(texts) + " |")
    return "\n".join(lines) + "\n"


def paired_table(files: list[str], attacks: list[str], models: list[str]) -> str:
    """Attacks down: accuracies of A and B, B minus A with its interval, adjusted p."""
    verdicts: dict[tuple[str, str], Verdicts] = {}
    with open_runs([ROOT / "reports" / "runs" / f"{file}.zip" for file in files]) as runs:
        for result in (result for run in runs for result in run.cells):
            verdicts[result.cell.model_name, result.cell.attack.label] = shown_verdicts(result)
    a, b = models
    found = [paired(verdicts[a, attack], verdicts[b, attack]) for attack in attacks]
    adjusted = holm([counts.p for counts in found])
    lines = [f"| attack | {a} | {b} | difference | p |", "|---|---|---|---|---|"]
    for attack, counts, p in zip(attacks, found, adjusted, strict=True):
        first, second = (100 * (counts.both + only) / counts.n for only in (counts.only_a, counts.only_b))
        gap = counts.difference()
        words = f"{gap.value:+.1f} [{gap.lower:+.1f}, {gap.upper:+.1f}]"
        lines.append(f"| {attack} | {first:.1f} | {second:.1f} | {words} | {p:.2g} |")
    return "\n".join(lines) + "\n"


TABLES = {"accuracy": accuracy_table, "bits": bits_table, "distance": distance_table}


def fill_page(text: str) -> str:
    """The page with every marked table as the CSV files have it."""

    def fill(place: re.Match[str]) -> str:
        kind, file, attacks, models = place.groups()
        comment = f"<!-- {kind}: {file} {attacks} {models} -->\n\n"
        if kind == "paired":
            return comment + paired_table(file.split(","), attacks.split(","), models.split(","))
        rows = pd.read_csv(ROOT / "reports" / "leaderboard" / f"{file}.csv")
        return comment + TABLES[kind](rows, attacks.split(","), models.split(","))

    return PLACE.sub(fill, text)


def main() -> int:
    """Write the pages, or compare them; the exit code."""
    wrong = 0
    for name in PAGES:
        text = (ROOT / name).read_text()
        filled = fill_page(text)
        if filled == text:
            continue
        wrong = 1
        if "--check" in sys.argv[1:]:
            print(f"{name} is not what reports/leaderboard says; run python benchmarks/result_tables.py")
        else:
            (ROOT / name).write_text(filled)
    return wrong if "--check" in sys.argv[1:] else 0


if __name__ == "__main__":
    sys.exit(main())
